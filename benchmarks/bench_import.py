"""What `import orthorank_kernels` and `import orthorank` add to `import torch`, in fresh processes.

    python benchmarks/bench_import.py [--runs 9] [--json benchmarks/results/import.json]

Each run is a new Python process that imports torch, then times one more import. Printed: the median and the range, in
milliseconds, the median CPU time (which other work on the machine disturbs less), and the five modules that took
longest by themselves. Under 50 ms is wanted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

WANTED_MS = 50
TIMED_IMPORT = """
import time
import torch
wall, cpu = time.perf_counter(), time.process_time()
import {module}
print(time.perf_counter() - wall, time.process_time() - cpu)
"""
# Installed packages have their byte code; without this a checkout might be compiled anew in each process.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True, env=ENVIRONMENT)


def milliseconds_to_import(module: str) -> tuple[float, float]:
    """Wall-clock and CPU time of one import in one new process."""
    wall, cpu = fresh_python("-c", TIMED_IMPORT.format(module=module)).stdout.split()
    return 1000 * float(wall), 1000 * float(cpu)


def slowest_modules(module: str, count: int) -> list[tuple[float, str]]:
    """(milliseconds, name) of the modules that ``module`` imports on top of torch, without what they import."""
    code = f"import torch, sys; sys.stderr.write('#begin\\n'); import {module}"
    trace = fresh_python("-X", "importtime", "-c", code).stderr
    lines = [line for line in trace.split("#begin\n", 1)[1].splitlines() if line.startswith("import time:")]
    fields = [line.removeprefix("import time:").split("|") for line in lines]
    return sorted(((int(own) / 1000, name.strip()) for own, _, name in fields), reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="fresh processes for each module")
    parser.add_argument("--json", type=Path, help="also write the medians to this file")
    options = parser.parse_args()
    runs, result = options.runs, {"python": sys.version.split()[0], "runs": options.runs}
    print(f"Python {sys.version.split()[0]}, {runs} fresh processes each, after `import torch`; wanted: {WANTED_MS} ms")
    for module in ("orthorank_kernels", "orthorank"):
        milliseconds_to_import(module)  # the first run writes the byte code and fills the file cache
        wall, cpu = zip(*(milliseconds_to_import(module) for _ in range(runs)), strict=True)
        print(
            f"{module:<18} median {statistics.median(wall):5.1f} ms ({min(wall):.1f} to {max(wall):.1f}), "
            f"CPU {statistics.median(cpu):.1f} ms"
        )
        result[module] = {"wall_ms": statistics.median(wall), "cpu_ms": statistics.median(cpu)}
        for own, name in slowest_modules(module, 5):
            print(f"    {own:6.1f} ms  {name}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
