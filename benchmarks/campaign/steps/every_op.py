"""A call of every op and layout at small sizes, for tools that watch a process: compute-sanitizer's, for example."""

from benchmarks.campaign.measure import Context
from tests.orthorank_kernels.every_op import Numbers, Sizes, calls


def run(context: Context) -> None:
    machine = context.machine
    for name, call in calls(Numbers(machine.device.type), Sizes(dtype=machine.dtype)).items():
        with context.guard(kind="check", what=name):
            call()
            machine.wait()
            context.lines.write(kind="check", what=name, status="ok")
