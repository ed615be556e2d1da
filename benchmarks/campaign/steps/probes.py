"""Single PTX instructions, each compared with the table that the project's PTX interpreter runs by."""

from benchmarks.campaign.measure import Context
from tests.ptx.probes import differences, run_here
from tests.ptx.probes_warps import all_probes


def run(context: Context) -> None:
    known, on_device = context.machine.probes(all_probes())
    for probe in known:
        if context.left() <= 0:
            context.lines.write(status="left out", note=f"late: {probe.title} and those after it")
            return
        with context.guard(kind="check", what=probe.title):
            found = differences(probe, on_device(probe), run_here(probe))
            assert not found, "; ".join(map(str, found))
            context.lines.write(kind="check", what=probe.title, status="ok")
