"""``orthorank bench --random-weights``: prefill at a real model's shapes, without its weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.commands.screen import half_range, table_of
from orthorank.common.errors import OrthoRankError
from orthorank.common.format import doubts

if TYPE_CHECKING:
    from rich.table import Table

    from orthorank.speed.bench import BenchSettings

NOT_HERE = {
    "model": "the model is made from the configuration",
    "decode_tokens": "only the prefill is measured",
    "lengths": "one length is measured, that of --prompt-tokens",
    "vllm_args": "the model runs in transformers",
}


def refuse(**options: Any) -> None:
    """Options of ``orthorank bench`` that mean nothing with random weights."""
    for name, value in options.items():
        if value is not None:
            shown = name if name == "model" else f"--{name.replace('_', '-')}"
            raise OrthoRankError(f"{shown} is not for --random-weights: {NOT_HERE[name]}; leave it out")


def run(
    screen: Any,
    config: str,
    plans: dict[str, Any] | None,
    settings: "BenchSettings",
    *,
    device: str,
    dtype: str | None,
    layers: int | None,
    graph: bool,
    compiled: bool,
    folder: Path | None,
    as_json: bool,
) -> int:
    """Measure and show; see `orthorank.speed.bench_random.bench_random`."""
    import torch

    from orthorank.commands.bench_shared import counted, deliver
    from orthorank.models import pick_device
    from orthorank.speed.bench_random import bench_random
    from orthorank.speed.random_weights import random_model, read_config, unsearched_plans

    read_config(config, layers)  # what is wrong with it is said before a model is made
    if graph and (place := pick_device(device)).type != "cuda":
        raise OrthoRankError(f"--graph is asked for and the device is {place}; CUDA graphs are of GPUs: leave it out")
    with screen.progress(f"making {config} with random weights", 1):
        model = random_model(config, device=device, dtype=dtype, layers=layers)
    depth = model.config.num_hidden_layers
    variants = {"dense": None, **(unsearched_plans(depth) if plans is None else plans)}
    with screen.progress("timing", settings.rounds) as advance:
        results = bench_random(model, variants, settings, graph=graph, compiled=compiled, on_step=counted(advance))
    about = {"config": str(config), "num_hidden_layers": depth, "torch": torch.__version__, **_triton()}
    about |= {"parameters": sum(p.numel() for p in model.parameters())}
    results = about | results
    return deliver(screen, results, folder, as_json=as_json, show=lambda: _show(screen, results))


def _triton() -> dict[str, str]:
    """The version that compiles the kernels: settings and code differ between them."""
    from importlib import metadata

    try:
        return {"triton": metadata.version("triton")}
    except metadata.PackageNotFoundError:
        return {}


def _show(screen: Any, results: dict[str, Any]) -> None:

    speed = results["prefill"]
    threads = f", {speed['threads']} threads" if speed["device"] == "cpu" else ""
    how = [word for word, on in (("compiled", results["compiled"]), ("replayed as a graph", results["graph"])) if on]
    triton = f", Triton {results['triton']}" if "triton" in results and speed["device"] != "cpu" else ""
    screen.heading(f"{results['config']}: {speed['dtype']} on {speed['device']}{threads}, by {speed['clock']}{triton}")
    screen.say(
        f"{results['num_hidden_layers']} layers, {results['parameters'] / 1e9:.2f} billion random weights; prompts of "
        f"{speed['batch']} x {speed['prompt']} random tokens, {speed['rounds']} rounds, "
        f"{' and '.join(how) or 'eager'}. "
        f"Attention of dense layers: {results['attention']}."
    )
    screen.table(_table(results))
    screen.say(
        "FLOPs: the speed-up that these alone would give; prefill: median of the ratios within a round; ±: half of the "
        "range between their quartiles; MiB: peak memory of an eager prefill."
    )
    for doubt in doubts(results["rows"], "prefill_speedup"):
        screen.say(doubt)
    screen.say(results["rule"])
    screen.say(results["remark"])


def _table(results: dict[str, Any]) -> "Table":
    drawn = table_of("", "layers", "nominal", "FLOPs", "prefill", "±", "ms", "tok/s", "MiB", no_wrap=True)
    for row in results["rows"]:
        ideal, peak = row["flop_speedup"], row["peak_bytes"]
        drawn.add_row(
            row["name"],
            str(row["layers"]),
            f"{100 * row['nominal_sparsity']:.0f} %",
            "-" if ideal is None else f"{ideal:.2f}x",
            f"{row['prefill_speedup']:.2f}x",
            half_range(row["prefill_speedup_spread"], results["prefill"]["rounds"]),
            f"{1000 * row['prefill_seconds']:,.1f}",
            f"{row['prefill_tokens_per_second']:,.0f}",
            "-" if peak is None else f"{peak / 2**20:,.0f}",
        )
    return drawn
