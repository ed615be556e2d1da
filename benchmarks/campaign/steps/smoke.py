"""Every op once at the shapes of a model, against float64; outputs that are not written are NaN. No times.

``what`` is "ops" for everything but attention, or the name of an attention kernel.
"""

from collections.abc import Callable

from benchmarks.campaign import kernels
from benchmarks.campaign.measure import Context
from benchmarks.micro.attention import sparse_query_attention
from benchmarks.micro.suite import ROWS
from benchmarks.micro.workload import Workload
from tests.orthorank_kernels.tools import poisoned_outputs


def run(context: Context, what: str) -> None:
    context.strict = True
    batch, tokens = context.sizes.smoke
    device = context.machine.device
    if what == "ops":
        hidden = context.sizes.rows[0][2]
        for make in ROWS:
            once(context, make.__name__, lambda make=make: make(device, batch, tokens, hidden))
        return
    with kernels.choosing(next(kernel for kernel in kernels.KERNELS if kernel.name == what)):
        once(context, what, lambda: sparse_query_attention(device, batch, tokens, *context.sizes.heads[0]))


def once(context: Context, what: str, make: Callable[[], Workload]) -> None:
    """One call, checked."""
    with context.guard(kind="check", what=what):
        made = make()
        call = made.providers[context.machine.backend]()
        with poisoned_outputs():
            result = call()
        context.machine.wait()
        made.check(result)
        context.lines.write(kind="check", what=what, shape=made.shape, status="ok")
