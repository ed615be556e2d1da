"""Shows a person how the PTX of a kernel runs.

    python -m tests.ptx gather_rows --arch 80 --seed 3 --trace
    python -m tests.ptx "sparse_query_attention.*dim 64" --arch 90 --program 0 --trace | less
    python -m tests.ptx rms_norm_score --arch 90 --drop bar.sync:2   # what a missing barrier looks like
    python -m tests.ptx --list

KERNEL is a regular expression for the titles of cases (`cases`). With --trace every instruction is printed: program,
instruction number, the warps that run it or, where not all of their lanes do, its threads, the text and the line of the
kernel's source. An error names the instruction, the warps, and for a race both accesses.
"""

import argparse
import re
import sys

from ptx_check.errors import PtxError
from ptx_check.scheduler import Trace
from ptx_check.table import Program
from tests.ptx.cases import CASES


def number_of(drop: str, ptx: str) -> int:
    """The number of an instruction, given as it is or as its opcode and which of these it is, from 1."""
    opcode, _, which = drop.partition(":")
    if opcode.isdigit():
        return int(opcode)
    found = [n for n, i in enumerate(Program(ptx).kernel.instructions) if ".".join(i.opcode) == opcode]
    if not 1 <= int(which or 1) <= len(found):
        raise SystemExit(f"--drop {drop}: the kernel has {len(found)} of {opcode}")
    return found[int(which or 1) - 1]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", nargs="?", default="", help="the first case that matches is run")
    parser.add_argument("--arch", type=int, default=80, help="80, 90 or 100")
    parser.add_argument("--seed", type=int, help="draws who runs next; without it programs run in order")
    parser.add_argument("--resident", type=int, default=3, help="programs at a time")
    parser.add_argument("--trace", action="store_true", help="print every instruction")
    parser.add_argument("--program", type=int, help="trace this program alone, by its number")
    parser.add_argument("--drop", metavar="N", help="leave out instruction N, or bar.sync:2, the second of that kind")
    parser.add_argument("--ptx", action="store_true", help="print the PTX after running it")
    parser.add_argument("--list", action="store_true", help="print the titles")
    options = parser.parse_args()
    found = [case for case in CASES if re.search(options.kernel, case.title)]
    if options.list or not found:
        print("\n".join(case.title for case in found or CASES))
        return 0 if options.list else 2

    from tests.ptx.worker import call, compare, prepare

    settings = prepare(f"sm_{options.arch}")
    settings.seed, settings.resident = options.seed, options.resident
    settings.trace = Trace(options.program) if options.trace or options.program is not None else None
    if options.drop is not None:
        settings.edit = lambda ptx: Program(ptx, {number_of(options.drop, ptx): None})
    case = found[0]
    print(f"{case.title}, sm_{options.arch}, seed {options.seed}", file=sys.stderr)
    try:
        results = call(case, "triton")
        if options.ptx:
            print(settings.launches[0].ptx)
        compare(case, results)
    except (PtxError, AssertionError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    steps = sum(launch.steps for launch in settings.launches)
    print(f"as the reference, in {steps} steps of groups of warps", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
