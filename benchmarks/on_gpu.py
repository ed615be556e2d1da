"""What needs a GPU, each in less than eight minutes: the kernel tests on hardware, with single instructions compared
with the table that `tests/ptx` runs PTX by, and the microbenchmarks.

    python benchmarks/on_gpu.py tests      # make test-gpu
    python benchmarks/on_gpu.py bench      # make bench-gpu

Tests: those that a GPU can judge (`tests/hardware.py`), in as many processes as there are cores for, and last, alone,
those of more than 2^31 elements. ``tests.jsonl`` gets a line for each test as it ends, ``tests.json`` the sum; both go
to ``--output``, or ``benchmarks/results/<name of the GPU>/``. Without a GPU that torch can use it says so and exits
with 2.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


from benchmarks.bench_ops import RESULTS, device_name, refusal, versions

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 480.0  # seconds
CORES = os.cpu_count() or 1
WORKERS = max(1, min(14, CORES - 2))  # most of the time goes to compiling, on the CPU
TESTS = ("tests/orthorank_kernels", "tests/ptx/test_on_gpu.py")
# What compiles for absent GPUs is the same on every machine: `make test` runs it.
ELSEWHERE = ("triton/test_compile.py",)
ONE_TEST = 60  # seconds; longer is a hang, and costs its worker
LAST = 0.15  # of the time: for tests that have begun, at most `ONE_TEST` / 3
# Which tests, and how many processes for them.
PARTS = {"all": ("not huge and (gpu or not slow)", WORKERS), "huge": ("huge", 1)}


def command(part: str, lines: Path, until: float) -> list[str]:
    """What runs a part of the tests. Workers, one too: a crash then costs one test."""
    chosen, workers = PARTS[part]
    limit = [f"--timeout={ONE_TEST}", "--timeout-method=thread"] if importlib.util.find_spec("pytest_timeout") else []
    return [
        sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "tests.hardware",
        "-p", "no:cacheprovider", "-n", str(workers), "--dist", "worksteal", "-m", chosen, *limit,
        f"--hardware-lines={lines}", f"--hardware-until={until}", *TESTS,
        *(f"--ignore=tests/orthorank_kernels/{name}" for name in ELSEWHERE),
    ]  # fmt: skip


def run(part: str, lines: Path, until: float, end: float) -> bool:
    """Run a part; whether all its tests passed. What still runs at ``end`` is killed, with its workers."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command(part, lines, until), cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait(timeout=max(0.0, end - time.time())) == 0
    except subprocess.TimeoutExpired:
        print(f"on_gpu: {part}: the time is over, and what still ran is stopped", file=sys.stderr)
        return False
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def summary(lines: Path) -> dict[str, Any]:
    """Counts of the lines by status, and the names of what failed."""
    from tests.hardware import lines_in

    tests = [line for line in lines_in(lines) if line["test"] != "all"]
    failed = [line["test"] for line in tests if line["status"] == "failed"]
    counts = {status: sum(line["status"] == status for line in tests) for status in ("ok", "skipped")}
    left_out = [line["note"] for line in lines_in(lines) if line["test"] == "all" and "left out" in line["note"]]
    return {"tests": len(tests), **counts, "failed": failed, "late": left_out}


def tests(output: Path, seconds: float) -> int:
    """The kernel tests, with real kernels in place of the interpreter's, and the instructions one by one."""
    if importlib.util.find_spec("xdist") is None:
        print("on_gpu: the tests run in several processes; run: pip install pytest-xdist", file=sys.stderr)
        return 2
    began = time.time()
    end = began + seconds
    until = end - min(LAST * seconds, ONE_TEST / 3)
    output.mkdir(parents=True, exist_ok=True)
    lines = output / "tests.jsonl"
    lines.unlink(missing_ok=True)
    passed = [run(part, lines, until, end) for part in PARTS if time.time() < until]
    about = {"device": device_name("cuda"), **versions(), "seconds": round(time.time() - began, 1), **summary(lines)}
    (output / "tests.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {output / 'tests.jsonl'} and tests.json")
    return 0 if all(passed) and about["tests"] else 1


def bench() -> int:
    """The microbenchmarks: steps of the campaign, whose results and table go to a folder of their own."""
    output = ROOT / "build" / "bench-gpu" / time.strftime("%Y%m%d-%H%M%S")
    command = [sys.executable, "benchmarks/gpu_campaign.py", "A", "--steps", "about,smoke,attention,rows", "--output",
               str(output), "--seconds", f"{LIMIT:.0f}"]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tests", "bench"))
    parser.add_argument("--output", type=Path, help="of the tests: folder for tests.jsonl and tests.json")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="of the tests: when they end (%(default).0f)")
    options = parser.parse_args()
    if (reason := refusal()) is not None:
        print(f"on_gpu: {reason}", file=sys.stderr)
        return 2
    if options.what == "bench":
        return bench()
    return tests(options.output or RESULTS / device_name("cuda"), options.seconds)


if __name__ == "__main__":
    sys.exit(main())
