"""The instruction forms that Triton emits for the kernels, by target: `emitted.txt`, one line for each.

    python -m tests.ptx.emitted            # compiles every case for every target and writes the file

`test_emitted` holds them against the tests of the table and the probes for a GPU; `test_kernels` holds what it runs
against the file, so that it cannot fall behind.
"""

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

FILE = Path(__file__).with_name("emitted.txt")
TARGETS = ("sm_80", "sm_90", "sm_100")


def read() -> dict[str, set[str]]:
    """Targets by form: ``{"add.s32": {"sm_80", "sm_90", "sm_100"}, ...}``."""
    lines = FILE.read_text(encoding="utf-8").splitlines()
    return {form: set(targets.split(", ")) for form, _, targets in (line.partition("  ") for line in lines)}


def forms_for(target: str) -> set[str]:
    """Compile every case for one target. Only in a process of its own: see `launchers`."""
    from tests.ptx.cases import cases_for
    from tests.ptx.worker import call, forms, prepare

    settings = prepare(target)
    settings.only_compile = True
    for case in cases_for(target):
        call(case, "triton")
    return {form for launch in settings.launches for form in forms(launch.ptx)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="print the forms of this one and write nothing")
    options = parser.parse_args()
    if options.target:
        print("\n".join(sorted(forms_for(options.target))))
        return
    found = defaultdict(list)
    for target in TARGETS:
        command = [sys.executable, "-m", "tests.ptx.emitted", "--target", target]
        printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
        for form in printed.splitlines():
            found[form].append(target)
    lines = (f"{form}  {', '.join(targets)}" for form, targets in sorted(found.items()))
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
