"""What `import orthorank_kernels` and `import orthorank` add to `import torch`, in fresh processes.

    python benchmarks/bench_import.py [--runs 9]

Each run is a new Python process that imports torch, then times one more import. Printed: the median and the range, in
milliseconds, and the ten modules that took longest by themselves. Under 50 ms is wanted.
"""

import argparse
import statistics
import subprocess
import sys

WANTED_MS = 50
TIMED_IMPORT = """
import time
import torch
began = time.perf_counter()
import {module}
print(time.perf_counter() - began)
"""


def seconds_to_import(module: str) -> float:
    code = TIMED_IMPORT.format(module=module)
    return float(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)


def slowest_modules(module: str, count: int) -> list[tuple[float, str]]:
    """(milliseconds, name) of the modules that ``module`` imports on top of torch, without what they import."""
    code = f"import torch, sys; sys.stderr.write('#begin\\n'); import {module}"
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], check=True, capture_output=True, text=True
    ).stderr
    lines = [line for line in trace.split("#begin\n", 1)[1].splitlines() if line.startswith("import time:")]
    fields = [line.removeprefix("import time:").split("|") for line in lines]
    return sorted(((int(own) / 1000, name.strip()) for own, _, name in fields), reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9, help="fresh processes for each module")
    runs = parser.parse_args().runs
    print(f"Python {sys.version.split()[0]}, {runs} fresh processes each, after `import torch`; wanted: {WANTED_MS} ms")
    for module in ("orthorank_kernels", "orthorank"):
        seconds_to_import(module)  # the first run writes the byte code and fills the file cache
        times = [1000 * seconds_to_import(module) for _ in range(runs)]
        print(f"{module:<18} median {statistics.median(times):6.1f} ms   ({min(times):.1f} to {max(times):.1f})")
        for own, name in slowest_modules(module, 10):
            print(f"    {own:6.1f} ms  {name}")


if __name__ == "__main__":
    main()
