"""Compiles the settings of every op for a GPU that need not be there, with the Triton at hand, and says what fails.

    python benchmarks/compile_report.py --target sm_90 [--slow]

Registers, spills and shared memory are counted; limits on them are kept for Triton 3.9 by `static_report.py`, and a
worse figure with another version is reported, not a failure. What does not compile, or wants more shared memory than
the GPU has, is one, and the exit code is 1.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.static.case import SHARED_LIMIT, TARGETS
from benchmarks.static.cases import CASES
from benchmarks.static.run import measurements, triton_version

CHUNK = 12


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--slow", action="store_true", help="every setting, not the defaults alone")
    options = parser.parse_args(given)
    cases = [case for case in CASES if options.slow or not case.slow]
    chunks: list[tuple[str, list[str]]] = []
    for group in dict.fromkeys(case.group for case in cases):
        names = [case.name for case in cases if case.group == group]
        chunks += [(group, names[i : i + CHUNK]) for i in range(0, len(names), CHUNK)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = [row for found in pool.map(lambda c: list(measurements(options.target, *c)), chunks) for row in found]
    failed = {row["case"]: row["error"].strip().splitlines()[-1] for row in rows if "error" in row}
    failed |= {
        row["case"]: f"{row['shared']} bytes of shared memory"
        for row in rows
        if row.get("shared", 0) > SHARED_LIMIT[options.target]
    }
    missing = {case.name for case in cases} - {row["case"] for row in rows}
    for name, why in failed.items():
        print(f"fails: {name}: {why}")
    for name in sorted(missing):
        print(f"was not compiled: {name}")
    spilling = sorted(row["case"] for row in rows if row.get("hot_spills"))
    print(f"{len(rows)} settings for {options.target} with Triton {triton_version()}: {len(failed)} fail, "
          f"{sum(bool(row.get('spills')) for row in rows)} spill, {len(spilling)} in attention's loops "
          f"{', '.join(spilling)}")  # fmt: skip
    return int(bool(failed or missing))


if __name__ == "__main__":
    sys.exit(main())
