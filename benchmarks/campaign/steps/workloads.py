"""A workload of the microbenchmarks, timed on several inputs in turn."""

from collections.abc import Callable
from typing import Any

from benchmarks.campaign.measure import Context, measure
from benchmarks.campaign.summary import OURS
from benchmarks.micro.workload import COMPILER, Workload, seeded


def timed(context: Context, make: Callable[..., Workload], size: tuple[int, ...], name: str, **fields: Any) -> None:
    """One provider of one workload; ``name`` begins with `OURS` where it is ours."""
    fields = {"op": make.__name__, "shape": "x".join(map(str, size)), "provider": name, **fields}
    with context.guard(**fields):
        calls = []
        before = COMPILER.set(context.sizes.compiler)
        for seed in range(context.sizes.sets):
            with seeded(seed):
                made = make(context.machine.device, *size)
            provider = context.machine.backend if name.startswith(OURS) else name
            calls.append((made.providers[provider](), made.check))
        COMPILER.reset(before)
        amount = made.amount_of(name)
        fields |= {"op": made.op, "shape": made.shape}
        if made.unit == "TFLOP/s":
            fields["needed_pairs"] = round(amount / (4 * size[-1]))
        measure(context, calls, amount=amount, unit=made.unit, **fields)
