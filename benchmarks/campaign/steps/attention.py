"""Attention of a third of the tokens beside its peers: SDPA with each backend forced, and FlexAttention."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import product

from benchmarks.campaign import kernels
from benchmarks.campaign.measure import Context, warm
from benchmarks.campaign.sizes import cut_of
from benchmarks.campaign.steps.workloads import timed
from benchmarks.campaign.summary import OURS
from benchmarks.micro.attention import DENSE, MASKED, sparse_query_attention

FLEX = "FlexAttention"


def run(context: Context) -> None:
    warm(context.machine, context.sizes.warm, context.sizes.product)
    wanted = list(cases(context))
    context.planned = len(wanted)
    for size, name in wanted:
        kernel = next((kernel for kernel in kernels.KERNELS if name == ours(kernel)), None)
        with nullcontext() if kernel is None else kernels.choosing(kernel):
            timed(context, sparse_query_attention, size, name)


def ours(kernel: kernels.Kernel) -> str:
    return f"{OURS}, {kernel.name}"


def cases(context: Context) -> Iterator[tuple[tuple[int, ...], str]]:
    """Sizes and who runs, in order; what is cut is a line."""
    own = [ours(kernel) for kernel in kernels.timed()]
    if not own:
        context.lines.write(status="left out", provider=OURS, note="every attention kernel is switched off")
    for heads, shape in product(context.sizes.heads, context.sizes.attention):
        if (cut := context.cut(*cut_of(*shape, heads[2]))) is not None:
            context.lines.write(status="left out", shape=f"{shape} {heads}", note=f"late: without {cut}")
            continue
        flex = [FLEX] if shape in context.sizes.flex and heads == context.sizes.heads[0] else []
        for name in (*own, *DENSE, *MASKED, *flex):
            yield (*shape, *heads), name
