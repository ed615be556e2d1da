"""``orthorank bench --random-weights``: prefill at a real model's shapes, without its weights."""

from typing import TYPE_CHECKING, Any

from orthorank.commands.bench_shared import counted, show_rows
from orthorank.commands.screen import RichScreen
from orthorank.common.environment import version_of
from orthorank.common.errors import OrthoRankError

if TYPE_CHECKING:
    from orthorank.speed.bench import BenchSettings

COLUMNS = [
    ("", "name"),
    ("layers", "layers"),
    ("nominal", "nominal_sparsity"),
    ("FLOPs", "flop_speedup"),
    ("prefill", "prefill_speedup"),
    ("±", "prefill_speedup_spread"),
    ("ms", "prefill_seconds"),
    ("tok/s", "prefill_tokens_per_second"),
    ("MiB", "peak_bytes"),
]
LEGEND = (
    "FLOPs: the speed-up that these alone would give; prefill: median of the ratios within a round; ±: half of the "
    "range between their quartiles; MiB: peak memory of an eager prefill."
)


def measured(
    screen: RichScreen,
    config: str,
    plans: dict[str, Any],
    settings: "BenchSettings",
    *,
    device: str,
    dtype: str | None,
    layers: int | None,
    graph: bool,
    compiled: bool,
) -> dict[str, Any]:
    """What `orthorank.speed.bench_random.bench_random` measures, and what it is of."""
    import torch

    from orthorank.models import pick_device
    from orthorank.speed.bench_random import bench_random
    from orthorank.speed.random_weights import random_model, read_config, unsearched_plans

    read_config(config, layers)  # what is wrong with it is said before a model is made
    if graph and (place := pick_device(device)).type != "cuda":
        raise OrthoRankError(f"--graph is asked for and the device is {place}; CUDA graphs are of GPUs: leave it out")
    with screen.progress(f"making {config} with random weights", 1):
        model = random_model(config, device=device, dtype=dtype, layers=layers)
    depth = model.config.num_hidden_layers
    variants = {"dense": None, **(plans or unsearched_plans(depth))}
    with screen.progress("timing", settings.rounds) as advance:
        results = bench_random(model, variants, settings, graph=graph, compiled=compiled, on_step=counted(advance))
    about = {"config": str(config), "num_hidden_layers": depth, "torch": torch.__version__}
    if (triton := version_of("triton")) is not None:  # it compiles the kernels: settings and code differ by version
        about |= {"triton": triton}
    return about | {"parameters": sum(p.numel() for p in model.parameters())} | results


def show(screen: RichScreen, results: dict[str, Any]) -> None:
    """Print the results for people."""
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
    show_rows(screen, results["rows"], speed["rounds"], COLUMNS, LEGEND)
    screen.say(results["rule"])
    screen.say(results["remark"])
