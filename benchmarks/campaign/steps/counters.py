"""Attention and norm + selection once each at the shapes of a model, for a profiler that watches the process."""

from benchmarks.campaign.measure import Context
from benchmarks.micro.attention import sparse_query_attention
from benchmarks.micro.rows import rms_norm_select


def run(context: Context) -> None:
    machine, sizes = context.machine, context.sizes
    for made in (
        rms_norm_select(machine.device, *sizes.rows[0]),
        sparse_query_attention(machine.device, *sizes.attention[0], *sizes.heads[0]),
    ):
        with context.guard(kind="check", what=made.name):
            made.providers[machine.backend]()()
            machine.wait()
            context.lines.write(kind="check", what=made.name, status="ok")
