"""Every kernel's PTX runs, for GPUs that need not be present, and gives what the reference gives.

Under random schedules, with several programs at a time, and with every check on: see `docs/ptx.md`.
"""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ptx import emitted
from tests.ptx.cases import CASES, GROUPS, cases_for
from tests.ptx.emitted import TARGETS

ROOT = Path(__file__).resolve().parents[2]
SEEDS = {target: seed for seed, target in enumerate(TARGETS, 1)}
USUAL = "sm_90"  # whose code every run of the suite executes; that of the others is in `make test-slow`

pytest.importorskip("triton")
if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) != (3, 9):
    pytest.skip("the table holds the instructions that Triton 3.9 emits", allow_module_level=True)


def compiler_environment() -> dict[str, str]:
    """That of a child process which compiles, where this one interprets."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}


def run_group(target: str, group: str, *more: str) -> list[dict]:
    """Results of the cases, from a child process with the compiler in place of the interpreter."""
    command = [sys.executable, "-m", "tests.ptx.worker", target, group, *more]
    child = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    return list(map(json.loads, child.stdout.splitlines()))


def check(target: str, group: str, slow: bool, *seeds: int) -> None:
    results = run_group(target, group, *(["--slow"] if slow else []), "--seeds", *map(str, seeds))
    titles = [case.title for case in cases_for(target) if case.group == group and case.slow == slow]
    assert titles
    assert [result["case"] for result in results] == titles
    failed = [f"{r['case']}, seed {r['seed']}: {r['error']}" for r in results if "error" in r]
    assert not failed, f"{target}\n" + "\n".join(failed)
    hopper = [r for r in results if ", hopper, " in r["case"]]
    usual = [r["case"] for r in hopper if set(r["kernels"]) - {"combine_kernel"} != {"hopper_attention_kernel"}]
    assert not usual, f"these ran another kernel than they are for: {usual}"
    known = {form for form, targets in emitted.read().items() if target in targets}
    new = {form for result in results for form in result["instructions"]} - known
    assert not new, f"{target}: write emitted.txt again with python -m tests.ptx.emitted; new are {sorted(new)}"


@pytest.mark.parametrize(
    "target", [pytest.param(each, marks=() if each == USUAL else pytest.mark.slow) for each in TARGETS]
)
@pytest.mark.parametrize("group", GROUPS)
def test_default_settings(group, target):
    """Under one schedule, another for each target: a race is seen under any."""
    check(target, group, False, SEEDS[target])


@pytest.mark.slow
@pytest.mark.parametrize("slow", [False, True], ids=["default", "further"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("group", GROUPS)
def test_everything_a_launcher_can_choose(group, target, slow):
    check(target, group, slow, *SEEDS.values())


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_rotating_queries_on_the_way_changes_no_bit(target):
    command = [sys.executable, "-m", "tests.ptx.rotation", target]
    child = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    assert int(child.stdout) > 2


def test_titles_are_unique():
    titles = [(case.group, case.title) for case in CASES]
    assert len(titles) == len(set(titles))
