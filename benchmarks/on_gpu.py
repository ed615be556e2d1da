"""What needs a GPU, each in less than eight minutes: the kernel tests on hardware, with single instructions compared
with the table that `tests/ptx` runs PTX by, and the microbenchmarks.

    python benchmarks/on_gpu.py tests      # make test-gpu
    python benchmarks/on_gpu.py bench      # make bench-gpu

Results go to ``benchmarks/results/<name of the GPU>/``. Without a GPU that torch can use it says so and exits with 2.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks.bench_ops import RESULTS, device_name, refusal, versions

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480.0  # seconds
WORKERS = min(8, os.cpu_count() or 1)  # most of the time goes to compiling, on the CPU
TESTS = ("tests/kernels", "tests/ptx/test_on_gpu.py")
# What compiles for absent GPUs or reads reports is the same on every machine: `make test` runs it.
ELSEWHERE = ("test_compile.py", "test_static_report.py", "test_committed_reports.py", "test_micro.py")


def summary(report: Path) -> dict[str, Any]:
    """Counts of a JUnit file, and the names of what failed."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    failed = [
        f"{case.get('classname')}::{case.get('name')}"
        for suite in suites
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {**counts, "failed": failed}


def tests(output: Path) -> int:
    """The kernel tests, with real kernels in place of the interpreter's, and the instructions one by one."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [
            sys.executable, "-m", "pytest", "-q", "-n", str(WORKERS), "-m", "gpu or not slow", *TESTS,
            f"--junitxml={report}", *(f"--ignore=tests/kernels/{name}" for name in ELSEWHERE),
        ]  # fmt: skip
        try:
            code = subprocess.run(command, cwd=ROOT, timeout=LIMIT, check=False).returncode
        except subprocess.TimeoutExpired:
            print(f"the tests took more than {LIMIT:.0f} s and were stopped", file=sys.stderr)
            return 1
        counts = summary(report)
    about = {"device": device_name("cuda"), **versions(), "seconds": round(time.monotonic() - began, 1), **counts}
    output.mkdir(parents=True, exist_ok=True)
    (output / "tests.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output / 'tests.json'}")
    return code


def bench() -> int:
    """The microbenchmarks: steps of the campaign, whose results and table go to a folder of their own."""
    output = ROOT / "build" / "bench-gpu" / time.strftime("%Y%m%d-%H%M%S")
    command = [sys.executable, "benchmarks/gpu_campaign.py", "A", "--steps", "about,smoke,attention,rows", "--output",
               str(output), "--seconds", f"{LIMIT:.0f}"]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tests", "bench"))
    options = parser.parse_args()
    if (reason := refusal()) is not None:
        print(f"on_gpu: {reason}", file=sys.stderr)
        return 2
    return bench() if options.what == "bench" else tests(RESULTS / device_name("cuda"))


if __name__ == "__main__":
    sys.exit(main())
