"""The tests on hardware without a GPU: lines as tests end, a lost GPU costs one worker, a killed run keeps its lines.

The GPU's errors are injected where the plugin waits for it.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hardware import lines_in

ROOT = Path(__file__).resolve().parents[1]
# The GPU reports an error after the test that asks for it, as an illegal access does: to every later test, too.
CONFTEST = """
import pytest
from tests import hardware

lost = []

def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.fixture
def breaks():
    lost.append(True)

@pytest.fixture(autouse=True)
def _in_a_good_process():
    assert not lost, "this test runs in the process that an earlier one broke"

hardware.synchronize = synchronize
hardware.uses_gpu = lambda item: "elsewhere" not in item.name
"""


def start(folder: Path, tests: str, *options: str, workers: int | None = 1) -> "subprocess.Popen[str]":
    """A run of ``tests`` in a process of its own, whose lines go to lines.jsonl."""
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_some.py").write_text(tests)
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "xdist.plugin", "-p", "tests.hardware", "-p", "no:cacheprovider",
        f"--hardware-lines={folder / 'lines.jsonl'}", *options, *(["-n", str(workers)] if workers else []), str(folder),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # other plugins take most of the time of so short a run
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


def lines(folder: Path) -> dict[str, dict[str, Any]]:
    """The lines by the test's own name."""
    return {line["test"].split("::")[-1]: line for line in lines_in(folder / "lines.jsonl")}


def test_what_a_gpu_judges_is_chosen_by_collection() -> None:
    """A third of the kernel tests, and of the instructions those of the GPU; nothing runs."""
    command = [
        sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "tests.hardware", "-p", "no:cacheprovider",
        "-m", "gpu or not slow", "tests/orthorank_kernels", "tests/ptx/test_on_gpu.py",
    ]  # fmt: skip
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout
    chosen = [line for line in said.splitlines() if "::" in line]
    assert 900 < sum("tests/orthorank_kernels/" in line for line in chosen) < 1500
    assert 300 < sum("test_a_gpu_gives_what_the_table_says" in line for line in chosen) < 400
    assert all("tests/orthorank_kernels/" in line or "test_a_gpu_gives" in line for line in chosen)
    assert any("test_extents_past_32_bits_on_a_gpu" in line for line in chosen)
    assert not any("[reference" in line for line in chosen if "test_one_sink_for_all" not in line)


FOUR = """
import pytest
def test_first(): pass
def test_breaks(breaks): pass
def test_after(): pass
def test_elsewhere(): assert False
@pytest.mark.skip(reason="not here")
def test_skipped(): pass
def test_wrong(): assert 1 == 2, "a number"
"""


def test_a_lost_gpu_costs_one_worker_and_the_test_is_named(tmp_path: Path) -> None:
    said, _ = start(tmp_path, FOUR).communicate(timeout=200)
    found = lines(tmp_path)
    assert {name: line["status"] for name, line in found.items()} == {
        "test_first": "ok",
        "test_breaks": "failed",
        "test_after": "ok",
        "test_skipped": "skipped",
        "test_wrong": "failed",
        "all": "failed",
    }, said
    assert "illegal memory access" in found["test_breaks"]["note"]
    assert found["test_breaks"]["phase"] == "teardown"
    assert "a number" in found["test_wrong"]["note"]
    assert found["test_skipped"]["note"] == "not here"
    assert found["all"]["note"] == "5 selected: 2 ok, 2 failed, 1 skipped"
    assert sum(1 for _ in lines_in(tmp_path / "lines.jsonl")) == 6, "one line for each test"


def test_without_workers_the_run_ends_there(tmp_path: Path) -> None:
    run = start(tmp_path, FOUR, workers=None)
    said, _ = run.communicate(timeout=200)
    assert run.returncode == 3, said
    assert "the GPU reports an error after" in said
    assert list(lines(tmp_path)) == ["test_first", "test_breaks", "all"]
    assert lines(tmp_path)["all"]["note"] == "5 selected: 1 ok, 1 failed, 0 skipped, 3 left out for lack of time"


CRASH = """
import os, time
def test_first(): pass
def test_crashes(): os._exit(9)
def test_after(): pass
"""


def test_a_worker_that_dies_is_a_line(tmp_path: Path) -> None:
    said, _ = start(tmp_path, CRASH).communicate(timeout=200)
    found = lines(tmp_path)
    assert {name: line["status"] for name, line in found.items()} == {
        "test_first": "ok",
        "test_crashes": "failed",
        "test_after": "ok",
        "all": "failed",
    }, said
    assert found["test_crashes"]["note"].startswith("its worker ended while it ran")


HANGS = """
import time
def test_first(): pass
def test_second(): pass
def test_hangs(): time.sleep(600)
def test_never(): pass
"""


def waited(folder: Path, count: int) -> Iterator[dict[str, Any]]:
    """The lines of a running process as soon as there are ``count``."""
    for _ in range(1200):
        if len(found := list(lines_in(folder / "lines.jsonl"))) >= count:
            return iter(found)
        time.sleep(0.1)
    raise AssertionError("no lines")


def test_a_killed_run_keeps_what_it_had(tmp_path: Path) -> None:
    run = start(tmp_path, HANGS)
    try:
        list(waited(tmp_path, 2))
    finally:
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    assert [line["test"].split("::")[-1] for line in lines_in(tmp_path / "lines.jsonl")] == [
        "test_first",
        "test_second",
    ]
    assert json.loads((tmp_path / "lines.jsonl").read_text().splitlines()[-1])["status"] == "ok"


def test_no_test_begins_after_the_time(tmp_path: Path) -> None:
    run = start(tmp_path, FOUR, "--hardware-until=1000")
    said, _ = run.communicate(timeout=200)
    assert list(lines(tmp_path)) == ["all"], said
    assert lines(tmp_path)["all"]["note"] == "5 selected: 0 ok, 0 failed, 0 skipped, 5 left out for lack of time"
