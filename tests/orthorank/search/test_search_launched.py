"""One search by two processes on the CPU (gloo): the same files as one process writes."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankError
from orthorank.search.run import run_search
from orthorank.stack.resources import OneProcess, joined, launched_rank, local_device, together
from tests.orthorank.search_runs import plan_in, settings, short_text, without_times

ROOT = Path(__file__).parents[3]
SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "fast": {"fast": True, "windows": 8},
    "removal": {"keep_ratio": 0.0},
    "within": {"keep_ratio": 0.0, "layers": None, "windows": 4, "max_loss": 0.6, "correct": 6},
    "ppl": {"method": "one-shot", "protect_first": 1},
    "influence": {"method": "influence", "protect_first": 1},
    "taylor": {"method": "one-shot", "metric": "taylor", "protect_first": 1},
}
MANY = """
import sys
from pathlib import Path
from torch import distributed
from orthorank import OrthoRankError
from orthorank.search.run import run_search
from tests.orthorank.search_runs import settings
from tests.orthorank.search.test_search_launched import SEARCHES
distributed.init_process_group("gloo")
folder, output = map(Path, sys.argv[1:])
for name, options in SEARCHES.items():
    results = run_search(settings(folder, output / name, **options))
    assert results["plan"]["layers"], "rank 0's results are everyone's"
try:
    run_search(settings(folder, output / "greedy"))
except OrthoRankError as error:
    print(f"rank {distributed.get_rank()}: {error}", flush=True)
assert distributed.is_initialized(), "a group that was there is left as it was"
"""


def free_port() -> str:
    with socket.socket() as own:
        own.bind(("127.0.0.1", 0))
        return str(own.getsockname()[1])


def launch(
    *arguments: str, launcher: tuple[str, ...] = ("torch.distributed.run",)
) -> "subprocess.CompletedProcess[str]":
    """Two processes of ``arguments``, by torchrun or another launcher, on one machine without a GPU."""
    port = "--main_process_port" if "accelerate" in launcher[0] else "--master-port"
    command = [sys.executable, "-m", *launcher, port, free_port(), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=500, check=False)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_folder: Path, tmp_path: Path) -> None:
    """Each method, within one launch. Taylor's gradients are added across processes, so it agrees by rounding."""
    script = tmp_path / "many.py"
    script.write_text(MANY)
    short_text(tiny_folder)
    done = launch("--nproc-per-node", "2", str(script), str(tiny_folder), str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert f"rank {rank}: output folder '{tmp_path}/two/greedy' has an earlier result" in done.stdout
    for name, options in SEARCHES.items():
        run_search(settings(tiny_folder, tmp_path / "one" / name, **options))
        one, two = (without_times(tmp_path / count / name) for count in ("one", "two"))
        if name != "taylor":
            assert two == one, name
            continue
        scores = [files[0]["calibration"]["scores"] for files in (one, two)]
        assert scores[1] == pytest.approx(scores[0], rel=1e-5)
        assert two[0]["layers"] == one[0]["layers"]
        assert two[0]["calibration"]["loss"] == one[0]["calibration"]["loss"]


@pytest.mark.slow
def test_accelerate_launch_shares_the_windows(tiny_folder: Path, tmp_path: Path) -> None:
    """The command itself: rank 0 alone writes and prints, and one process goes on with what two began."""
    options = [
        *("-m", "orthorank", "search", str(tiny_folder), "--device", "cpu", "--no-sink-floor", "--protect-last", "1"),
        *("--layers", "2", "--windows", "3", "--window", "32", "--batch-size", "1"),
        *("--text", str(short_text(tiny_folder)), "--output", str(tmp_path / "two")),
    ]
    # --multi_gpu is what makes accelerate start several processes itself; there need be no GPU
    accelerate = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    plain = ("--mixed_precision", "no", "--dynamo_backend", "no")
    done = launch(*options, launcher=(*accelerate, *plain))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("round 2 of 2") == 1
    assert "2 processes" in done.stdout
    run_search(settings(tiny_folder, tmp_path / "one"))
    assert plan_in(tmp_path / "two") == plan_in(tmp_path / "one")
    state = tmp_path / "two" / "search-state.json"
    assert state.read_text() == (tmp_path / "one" / "search-state.json").read_text()
    run_search(settings(tiny_folder, tmp_path / "two", resume=True))
    assert without_times(tmp_path / "two") == without_times(tmp_path / "one")
    again = launch(*options, launcher=(*accelerate, *plain))
    assert again.returncode != 0
    assert again.stderr.count("orthorank: output folder") == 1, "one sentence, from one of the processes"


def test_a_process_alone_is_its_own_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined() as group:
        assert isinstance(group, OneProcess)
        assert (group.rank, group.size) == (0, 1)
        assert group.gather([1.0, 2.0]) == [[1.0, 2.0]]
        assert group.share("a") == "a"
        total = torch.ones(2)
        group.add(total)
        assert total.tolist() == [1.0, 1.0]
        assert together(group, lambda: 7) == 7
    assert not torch.distributed.is_initialized()
    monkeypatch.setenv("RANK", "1")
    assert launched_rank() == 0, "RANK alone is no launcher"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched_rank() == 1
    assert local_device("cpu") == "cpu"


def test_an_incomplete_launch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(OrthoRankError, match=r"one of 2 processes by WORLD_SIZE, .*RANK.*start them with accelerate"),
        joined(),
    ):
        pass
    assert not torch.distributed.is_initialized()


def test_what_fails_on_one_process_fails_on_all() -> None:
    class Two(OneProcess):
        size = 2

        def collect(self, value: Any) -> list[Any]:
            return [value, "process 1 has no such file"]

    with pytest.raises(OrthoRankError, match="process 1 has no such file"):
        together(Two(), lambda: "here all is well")


def test_several_processes_and_a_spread_model_exclude_each_other(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    class Two(OneProcess):
        size = 2

    @contextmanager
    def two() -> Any:
        yield Two()

    monkeypatch.setattr("orthorank.search.run.joined", two)
    with pytest.raises(OrthoRankError, match="device_map spreads the model of one process over the devices"):
        run_search(settings(tiny_folder, tmp_path, device="auto", device_map="auto"))
