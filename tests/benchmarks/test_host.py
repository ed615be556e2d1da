"""The benchmark of host time, and by its stand-in for a driver: a launch by plan is the launch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "bench_host.py")]


def run(*arguments: str) -> str:
    """In a process without the interpreter, which compiles for an absent GPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    child = subprocess.run([*COMMAND, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-4000:]
    return child.stdout


@pytest.mark.slow
def test_a_launch_by_plan_hands_the_driver_what_any_launch_does():
    assert run("--check").count("1 launches, 9 lengths") == 14


@pytest.mark.slow
def test_a_hit_costs_less_than_a_call_without_a_plan(tmp_path):
    out = run("--only", "^gather_rows", "--rounds", "3", "--json", str(tmp_path / "host.json"))
    figures = dict(zip(out.split()[-10::2], map(float, out.split()[-9::2]), strict=True))
    assert figures["hit"] < figures["lengths"] < figures["first"] < figures["traced"]
    assert (tmp_path / "host.json").exists()
