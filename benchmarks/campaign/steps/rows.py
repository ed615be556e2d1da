"""The ops on rows, which memory bounds, beside PyTorch: rates as shares of the copy rate of the same run."""

from benchmarks.campaign.measure import Context, warm
from benchmarks.campaign.sizes import cut_of
from benchmarks.campaign.steps.workloads import timed
from benchmarks.campaign.summary import OURS
from benchmarks.micro.suite import PEERS, ROWS

COMPILED = ("rms_norm_score",)  # where the reference compiled is a peer, too


def run(context: Context) -> None:
    warm(context.machine, context.sizes.warm, context.sizes.product)
    wanted = []
    for size in context.sizes.rows:
        if (cut := context.cut(*cut_of(*size[:2]))) is not None:
            context.lines.write(status="left out", shape="x".join(map(str, size)), note=f"late: without {cut}")
            continue
        for make in ROWS:
            compiled = ("torch.compile",) if make.__name__ in COMPILED else ()
            wanted += [(make, size, name) for name in (OURS, "torch", *compiled, *PEERS.get(make.__name__, ()))]
    context.planned = len(wanted)
    for make, size, name in wanted:
        timed(context, make, size, name)
