"""Microbenchmarks of every op beside PyTorch, torch.compile of that, and the kernels of others.

    python benchmarks/bench_ops.py
    python benchmarks/bench_ops.py --only attention

On a CPU, at small shapes, in one thread; on a GPU the same workloads are a part of `benchmarks/gpu_campaign.py`. Every
result is checked before its time is taken; one that is wrong has no number and the command exits with 1. Medians. What
is counted as work is said in the docstring of each workload in `benchmarks/micro/`. Writes ``ops.csv``, ``ops.svg`` and
``ops.json`` (versions, and what was left out and why) to ``benchmarks/results/cpu/``.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.micro.results import rows_of, table, write_csv, write_plot
from benchmarks.static.run import triton_version

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def device_name(device: str) -> str:
    """A folder's name: ``cpu``, or the GPU's, such as ``nvidia-h100-80gb-hbm3``."""
    if device == "cpu":
        return "cpu"
    return re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def refusal() -> str | None:
    """Why nothing can be run here, or None."""
    if torch.cuda.is_available():
        return None
    build = torch.version.cuda or torch.version.hip
    reason = f"torch {torch.__version__} finds none" if build else f"torch {torch.__version__} is a build without GPUs"
    return f"this needs a GPU, and {reason}; `make test` and `make bench` do what a CPU can"


def versions() -> dict[str, str]:
    return {"torch": torch.__version__, "triton": triton_version(), "python": sys.version.split()[0]}


def run(only: str, seconds: float, folder: Path) -> tuple[int, dict[str, Any]]:
    """Run pytest-benchmark in a process of its own; returns its exit code, and the measurements if there are any."""
    report, left_out = folder / "report.json", folder / "left_out.json"
    command = [
        sys.executable, "-m", "pytest", "benchmarks/micro", "-q", "--no-header", "--tb=short", "--show-capture=no",
        "-p", "no:cacheprovider", "-p", "no:xdist", "--benchmark-columns=median,rounds", "--benchmark-warmup=off",
        "-W", "ignore::DeprecationWarning", f"--seconds={seconds}",
        f"--benchmark-json={report}", f"--left-out={left_out}", *(["-k", only] if only else []),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    measured = report.exists() and report.stat().st_size > 0
    return code, {
        "rows": rows_of(report, "cpu") if measured else [],
        "left_out": json.loads(left_out.read_text(encoding="utf-8")) if left_out.exists() else [],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="benchmarks whose name holds it; writes nothing")
    parser.add_argument("--seconds", type=float, default=420.0, help="no benchmark begins after so many (default: 420)")
    parser.add_argument("--output", type=Path, help="folder for the results")
    options = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
        import pytest_benchmark  # noqa: F401
    except ModuleNotFoundError as error:
        print(f"bench_ops: {error.name} is not installed; run: make bench-install", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        code, measured = run(options.only, options.seconds, Path(folder))
    print(table(measured["rows"]))
    for left in measured["left_out"]:
        print(f"left out: {left['benchmark']}: {left['why']}")
    if measured["rows"] and not options.only:
        output = options.output or RESULTS / "cpu"
        output.mkdir(parents=True, exist_ok=True)
        write_csv(output / "ops.csv", measured["rows"])
        write_plot(output / "ops.svg", measured["rows"])
        about = {"device": "cpu", **versions(), "left_out": measured["left_out"]}
        (output / "ops.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {output}/ops.csv, ops.svg and ops.json")
    return code


if __name__ == "__main__":
    sys.exit(main())
