"""Everything that is measured in the first minutes on a GPU, each result kept the moment it is there.

    python3 benchmarks/gpu_campaign.py A --output OUT               # what comes first, stops itself after 520 s
    python3 benchmarks/gpu_campaign.py B --output OUT2 --seconds 230  # what is left, at once after A
    python3 benchmarks/gpu_campaign.py A --output OUT --dry-run     # on a CPU, tiny, the same parent and steps

Each step runs in child processes with limits of their own: one that hangs, crashes or fails is a line in
``results.jsonl`` and not the end. Lines are on the disk at once; ``table.md`` is there after every step, and when the
campaign is stopped. B begins with the lines that A left on this machine. Works from a checkout without installing it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.campaign import machine, plan
from benchmarks.campaign.parent import Options, Parent


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=tuple(plan.CAMPAIGNS))
    parser.add_argument("--output", type=Path, required=True, help="folder for the results, without any in it")
    parser.add_argument(
        "--seconds", type=float, help=f"when it stops itself (default: A {plan.A_SECONDS:g}, B {plan.B_SECONDS:g})"
    )
    parser.add_argument("--steps", metavar="NAME,...", help="only these of its steps, in its order")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny, in PyTorch")
    parser.add_argument("--machine", type=Path, help=argparse.SUPPRESS)  # where lines are left for B; tests have theirs
    options = parser.parse_args(given)
    names = [step.name for step in plan.CAMPAIGNS[options.campaign]]
    for name in (options.steps or "").split(",") if options.steps else ():
        if name not in names:
            parser.error(f"--steps has {name!r}; steps of {options.campaign} are {', '.join(names)}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds is {options.seconds:g}; it must be above 0")
    if (options.output / "results.jsonl").exists():
        parser.error(f"--output {options.output} holds results already; name an empty folder")
    return options


def main(given: Sequence[str] | None = None) -> int:
    options = arguments(given)
    name = options.campaign
    wanted = (options.steps or "").split(",") if options.steps else None
    steps = [step for step in plan.CAMPAIGNS[name] if wanted is None or step.name in wanted]
    place = options.machine or machine.folder()
    patience = plan.PATIENCE if options.dry_run and options.seconds is None else 1.0
    seconds = plan.SECONDS[name] if options.seconds is None else options.seconds
    return Parent(
        Options(
            name, steps, options.output, seconds, place, dry=options.dry_run, patience=patience, earlier=name == "B"
        )
    ).run()


if __name__ == "__main__":
    sys.exit(main())
