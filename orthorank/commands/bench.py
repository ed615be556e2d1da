"""``orthorank bench``: how fast the dense model and plans run here, and how much memory they hold."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orthorank.commands import Criteria, Device, Dtype, Model, numbers, register
from orthorank.commands.bench_shared import counted, deliver, refuse, shipped, show_rows
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, console
from orthorank.common.errors import OrthoRankError, check_choice
from orthorank.common.files import writable_folder
from orthorank.common.format import count
from orthorank.common.progress import say_replaced

ENGINES = ("transformers", "vllm")
PLANS = (
    "Plan to compare with the dense model: a file, a folder, or org/name@revision on the Hub; may be given several "
    "times. Default: the plans shipped for the model, OrthoRank's and layer pruning's."
)
ENGINE = "transformers, or vllm: prefill throughput and time to first token inside vLLM, one engine for each variant."
VLLM_ARGS = "With --engine vllm: keyword arguments of vllm.LLM for all engines, a JSON object."
DECODE = "Tokens to decode after the first one; 0: none. Default: 32; with --engine vllm not measured."
RANDOM = (
    "In place of a model: llama-2-7b, llama-3-8b, mistral-7b, qwen2.5-7b, or a model's config.json. Times the "
    "prefill with random weights made on the device; quality is not measured."
)
MODEL_LAYERS = "With --random-weights: decoder layers to make. Default: all."
GRAPH = "With --random-weights: replay a CUDA graph of the prefill in place of calling the model."
COMPILE = "With --random-weights: torch.compile of the layers, one compilation for all that are alike."
LENGTHS_ARE = "numbers of tokens such as 128,512, or 0 for none"
LENGTHS = "Prompt lengths, as 128,512, to find the shortest at which a plan is faster; 0: none. Default: 64, 128, ..."
NOT_IN_VLLM = {
    "decode_tokens": "generated tokens pass all layers there, so only the prefill is measured",
    "lengths": "one length is measured, that of --prompt-tokens",
    "threads": "vLLM binds threads by VLLM_CPU_OMP_THREADS_BIND",
    "device": "vLLM chooses it; hide others with CUDA_VISIBLE_DEVICES",
    "random_weights": "the model that is measured there is loaded by vLLM",
}
NOT_RANDOM = {
    "model": "the model is made from the configuration",
    "decode_tokens": "only the prefill is measured",
    "lengths": "one length is measured, that of --prompt-tokens",
    "vllm_args": "the model runs in transformers",
}
COLUMNS = [
    ("", "name"),
    ("nominal", "nominal_sparsity"),
    ("FLOPs", "flop_speedup"),
    ("prefill", "prefill_speedup"),
    ("tok/s", "prefill_tokens_per_second"),
    ("token 1", "first_token_speedup"),
    ("decode", "decode_speedup"),
    ("tok/s", "decode_tokens_per_second"),
    ("MiB", "peak_bytes"),
]


def command(
    model: Model = None,
    plan: Annotated[list[str] | None, typer.Option(help=PLANS)] = None,
    criterion: Criteria = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Prompts processed together.")] = 1,
    rounds: Annotated[int, typer.Option(help="Timed runs of each variant.")] = 10,
    decode_tokens: Annotated[int | None, typer.Option(help=DECODE, show_default=False)] = None,
    lengths: Annotated[str | None, typer.Option(help=LENGTHS)] = None,
    device: Device = "auto",
    dtype: Dtype = None,
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch on a CPU. Default: PyTorch's choice.")] = None,
    engine: Annotated[str, typer.Option(help=ENGINE)] = "transformers",
    vllm_args: Annotated[str | None, typer.Option(help=VLLM_ARGS)] = None,
    random_weights: Annotated[str | None, typer.Option(help=RANDOM, show_default=False)] = None,
    model_layers: Annotated[int | None, typer.Option(help=MODEL_LAYERS, show_default=False)] = None,
    graph: Annotated[bool, typer.Option("--graph", help=GRAPH)] = False,
    compiled: Annotated[bool, typer.Option("--compile", help=COMPILE)] = False,
    output: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.csv.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Time prefill, first token and decoding of the dense model and of plans, in turn, and compare with FLOPs.

    Prompts are random. The dense model and each plan run once a round, in rotating order. Speed-ups are medians of the
    ratios within a round. GPUs are timed by CUDA events, CPUs and vLLM by the wall clock.
    """
    from orthorank.commands import bench_random, bench_vllm
    from orthorank.speed.bench import BenchSettings, read_plans, run_bench
    from orthorank.speed.bench_results import results_of

    register(criterion)
    check_choice("engine", engine, ENGINES)
    settings = BenchSettings(
        prompt_tokens=prompt_tokens,
        batch_size=batch_size,
        rounds=rounds,
        decode_tokens=32 if decode_tokens is None else decode_tokens,
        lengths=None if lengths is None else _lengths(lengths),
    )
    plans = read_plans(plan)
    folder = None if output is None else writable_folder(output)
    screen = RichScreen(console(stderr=json))
    say_replaced(screen, folder, "bench.json", "bench.csv")
    given = {"model": model, "decode_tokens": decode_tokens, "lengths": lengths, "threads": threads, "device": device}
    given |= {"random_weights": random_weights, "vllm_args": vllm_args}
    if engine == "vllm":
        refuse("--engine vllm", NOT_IN_VLLM, given)
        results, show = bench_vllm.measured(screen, model, plans, settings, dtype, vllm_args), bench_vllm.show
    elif random_weights is not None:
        refuse("--random-weights", NOT_RANDOM, given)
        _set_threads(threads)
        how: dict[str, Any] = {"device": device, "dtype": dtype, "layers": model_layers}
        results = bench_random.measured(screen, random_weights, plans, settings, graph=graph, compiled=compiled, **how)
        show = bench_random.show
    else:
        for name, value in (("--model-layers", model_layers), ("--graph", graph), ("--compile", compiled)):
            if value:
                raise OrthoRankError(f"{name} is for --random-weights; leave it out")
        if vllm_args is not None:
            raise OrthoRankError("vllm_args is for --engine vllm")
        _set_threads(threads)
        loaded, _, info = load(screen, model, device, dtype, plans, plan)
        variants: dict[str, Any] = {"dense": None} | (plans or shipped(loaded))
        total = 2 * settings.rounds + len(settings.lengths or ())
        with screen.progress("timing", total) as advance:
            report = run_bench(loaded, variants, settings, on_step=counted(advance))
        results, show = results_of(loaded, info, variants, report), _show
    deliver(screen, results, folder, as_json=json, show=show)
    return 0


def _lengths(words: str) -> tuple[int, ...]:
    return () if words.strip() == "0" else tuple(numbers("--lengths", words, LENGTHS_ARE) or ())


def _set_threads(threads: int | None) -> None:
    if threads is None:
        return
    import torch

    if threads < 1:
        raise OrthoRankError(f"threads is {threads}; it must be at least 1")
    torch.set_num_threads(threads)


def _show(screen: RichScreen, results: dict[str, Any]) -> None:
    speed, settings = results["bench"]["prefill"], results["bench"]["settings"]
    threads = f", {count(speed['threads'], 'thread')}" if speed["device"] == "cpu" else ""
    screen.heading(f"{results['model']['name']}: {speed['dtype']} on {speed['device']}{threads}, by {speed['clock']}")
    screen.say(
        f"Prompts of {settings['batch_size']} x {settings['prompt_tokens']} random tokens, "
        f"{count(settings['rounds'], 'round')}."
    )
    legend = (
        "nominal: share of token updates left out; FLOPs: the speed-up that they alone would give; then speed-ups of "
        "the prefill, of the time to the first token (with a cache) and of decoding, medians of the ratios within a "
        f"round; MiB: peak memory of a prefill ({results['bench']['memory_meter'] or 'not measured here'})."
    )
    show_rows(screen, results["rows"], settings["rounds"], COLUMNS, legend)
    for row in results["rows"][1:]:
        screen.say(_break_even_sentence(row, results))


def _break_even_sentence(row: dict[str, Any], results: dict[str, Any]) -> str:
    lengths = results["bench"]["settings"]["lengths"]
    begin, rounds = f"{row['name']}: prefill {row['prefill_speedup']:.2f}x", results["bench"]["settings"]["rounds"]
    if rounds > 1:
        begin += f" ± {row['prefill_speedup_spread']:.2f} (half of the range between the rounds' quartiles);"
    else:
        begin += " in one round, which has no spread;"
    if not lengths:
        return f"{begin} the break-even was not looked for (--lengths)."
    measured = ", ".join(map(str, lengths))
    if row["break_even"] is None:
        return f"{begin} slower than dense at the longest prompt measured (of {measured} tokens)."
    return (
        f"{begin} worth it from {row['break_even']} tokens on (not slower than dense there and at every longer prompt "
        f"measured: {measured})."
    )
