"""One process of a campaign: it measures one step, writes a line for each result, and ends.

    python -m benchmarks.campaign.child STEP JOB [WHAT]

JOB is what `job.Job` writes. It ends with 0; with 1 when something was wrong or broke the step; with 75 when the GPU
context is lost, so that it can be started again for what it has not measured.
"""

import faulthandler
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.campaign.job import Job
from benchmarks.campaign.lines import Lines, read
from benchmarks.campaign.parent import LOST


def main(given: Sequence[str] | None = None) -> int:
    step, text, *more = sys.argv[1:] if given is None else given
    faulthandler.enable()
    job = Job.read(text)
    import torch

    from benchmarks.campaign import cuda, dry, sizes
    from benchmarks.campaign.measure import Context, Lost, words

    machine = dry.Cpu() if job.dry else cuda.Gpu()
    lines = Lines(job.outputs_as_paths(), {"step": step, **job.common, "gpu": machine.facts()["gpu"]})
    context = Context(machine, job, lines, sizes.DRY if job.dry else sizes.FULL)
    before = len(read(job.results))
    run = importlib.import_module(f"benchmarks.campaign.steps.{step}").run
    try:
        with torch.inference_mode():
            run(context, *more)
    except Lost as error:
        lines.write(status="failed", note=f"the GPU context is lost: {error}")
        return LOST
    except Exception as error:
        lines.write(status="failed", note=words(error), what=" ".join(more) or step)
        return LOST if is_lost(machine) else 1
    own = [line for line in read(job.results)[before:] if line.get("step") == lines.common["step"]]
    return int(any(line.get("status") in ("wrong", "failed")[: 1 + context.strict] for line in own))


def is_lost(machine: Any) -> bool:
    """Whether the GPU does nothing any more in this process."""
    try:
        machine.wait()
    except RuntimeError:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
