"""What a selected layer costs the host, beside the dense layer that it replaces: microseconds of CPU time of a thread.

    python benchmarks/bench_host_layer.py [--json benchmarks/results/host.json [--before]] [--profile]

As in bench_host.py nothing is launched and tensors lie on the CPU; and here products, and the dense layers' attention,
give empty results. What is left is the work of the host: Python, argument checks, operators, and for the dense layer
the arithmetic of 24 tokens of 256 channels.

Printed: a layer of each kind, dense, selected and removed, from models of eight layers of which six are of that kind,
in turns; the time of a selected layer that is spent in the package's ops, and all the rest; and how many ops a selected
layer calls. Wanted are at most 1.5 times the dense layer, 180 us in the ops and 180 in the rest.
"""

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import bench_host

LAYERS, CHANGED, TOKENS = 8, [1, 2, 3, 4, 5, 6], 24
KINDS = {"dense": 1.0, "removed": 0.0, "selected": 1 / 3}


def model_of(dtype: torch.dtype = torch.bfloat16) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(num_hidden_layers=LAYERS, vocab_size=64, max_position_embeddings=256, **shape)
    return LlamaForCausalLM(config).to(dtype).eval()


def products_are_free() -> None:
    """From now on products and the dense layers' attention allocate their results and compute nothing."""

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x.new_empty(*x.shape[:-1], weight.shape[0])

    functional: Any = torch.nn.functional
    functional.linear = product
    linear: Any = torch.nn.Linear
    linear.forward = lambda self, x: product(x, self.weight)
    functional.scaled_dot_product_attention = lambda q, *args, **kwargs: torch.empty_like(q)


class InOps:
    """The time that is spent inside the package's ops, theirs calls counted."""

    def __init__(self) -> None:
        self.spent, self.calls = 0, 0

    def around(self, op: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = time.thread_time_ns()
            try:
                return op(*args, **kwargs)
            finally:
                self.spent += time.thread_time_ns() - begin
                self.calls += 1

        return timed


def watched(ops: InOps) -> Callable[[], None]:
    """Every op is timed wherever the method's rooms have imported it; returns what undoes it."""
    import orthorank_kernels

    names = {id(getattr(orthorank_kernels, name)): name for name in orthorank_kernels.__all__}
    found = []
    for module in [module for name, module in sys.modules.items() if name.startswith("orthorank.")]:
        for name, value in list(vars(module).items()):
            if id(value) in names and hasattr(value, "__wrapped__"):  # which ops have, and `keep_count` has not
                found.append((module, name, value))
    for module, name, value in found:
        setattr(module, name, ops.around(value))

    def undo() -> None:
        for module, name, value in found:
            setattr(module, name, value)

    return undo


def per_forward(run: Callable[[], Any], count: int = 20) -> float:
    begin = time.thread_time_ns()
    for _ in range(count):
        run()
    return (time.thread_time_ns() - begin) / 1000 / count


def measured(rounds: int, profile: bool = False) -> dict[str, Any]:
    import orthorank

    ids = torch.randint(0, 64, (1, TOKENS))
    models = {kind: model_of() for kind in KINDS}
    for kind, ratio in KINDS.items():
        if ratio < 1:
            orthorank.apply(models[kind], orthorank.OrthoRankConfig(layers=CHANGED, keep_ratio=ratio))
    runs = {kind: lambda model=model: model(ids, use_cache=False) for kind, model in models.items()}
    for run in runs.values():
        per_forward(run)
    if profile:
        bench_host.profile(runs["selected"])
        return {}
    forwards: dict[str, list[float]] = {kind: [] for kind in KINDS}
    linear = []
    a, b = torch.zeros(1, 1), torch.zeros(1, 1)
    for _ in range(rounds):
        for kind, run in runs.items():
            forwards[kind].append(per_forward(run))
        linear.append(bench_host.spent(bench_host.cycle([lambda: torch._C._nn.linear(a, b)], 200), 200))
    bench_host.LAUNCHED.clear()
    ops = InOps()
    undo = watched(ops)
    in_ops = []
    for _ in range(rounds):
        ops.spent = ops.calls = 0
        per_forward(runs["selected"])
        in_ops.append(ops.spent / 1000 / 20 / len(CHANGED))
    undo()
    median = {kind: statistics.median(values) for kind, values in forwards.items()}
    dense, selected = ((median[kind] - median["removed"]) / len(CHANGED) for kind in ("dense", "selected"))
    ratios = [
        (values["selected"] - values["removed"]) / (values["dense"] - values["removed"])
        for values in (dict(zip(forwards, row, strict=True)) for row in zip(*forwards.values(), strict=True))
    ]
    return {
        "dense": round(dense, 1),
        "selected": round(selected, 1),
        "selected_over_dense": round(statistics.median(ratios), 3),
        "in_ops": round(statistics.median(in_ops), 1),
        "rest": round(selected - statistics.median(in_ops), 1),
        "ops": ops.calls / 20 / len(CHANGED),
        "linear": round(statistics.median(linear), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    parser.add_argument("--before", action="store_true", help="in it they are those of the code before")
    parser.add_argument("--profile", action="store_true", help="where the time of a forward goes, and nothing else")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import triton

    import orthorank  # noqa: F401, so that what is patched below is patched where it is used

    bench_host.stand_in_gpu()
    bench_host.cpu_is_the_gpu()
    products_are_free()
    with torch.no_grad():
        found = measured(options.rounds, options.profile)
    if not found:
        return
    print(f"Triton {triton.__version__}, PyTorch {torch.__version__}; microseconds of CPU time of the thread")
    print("  ".join(f"{name} {value}" for name, value in found.items()))
    if options.json is not None:
        kept = json.loads(options.json.read_text(encoding="utf-8")) if options.json.exists() else {}
        kept["layer_before" if options.before else "layer"] = found
        options.json.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
