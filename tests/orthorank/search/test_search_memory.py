"""What a search allows itself by the free memory."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankError, cli
from orthorank.demo import SilentScreen
from orthorank.search import Evaluator
from orthorank.search.run import prepare, run_search
from orthorank.stack import resources as memory
from orthorank.stack.resources import OneProcess
from tests.orthorank.models import plain
from tests.orthorank.plain_search import random_windows, small_stack
from tests.orthorank.search_runs import plan_in, settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def free(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: count)


def test_free_memory_is_what_the_system_and_the_container_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < memory.free_bytes(CPU) <= total
    (tmp_path / "meminfo").write_text("MemTotal: 4000 kB\nMemFree: 1000 kB\nMemAvailable: 3000 kB\n")
    assert memory._available_in_system(tmp_path / "meminfo") == 3000 * 1024
    assert memory._available_in_system(tmp_path / "nothing") == total // 2, "half of it, where nothing tells more"
    (tmp_path / "memory.current").write_text("700\n")
    for limit, left in (("1000\n", 300), ("500\n", 0), ("max\n", 2**63)):
        (tmp_path / "memory.max").write_text(limit)
        assert memory._available_in_group(tmp_path) == left
    assert memory._available_in_group(tmp_path / "nothing") == 2**63
    monkeypatch.setattr(memory, "_available_in_group", lambda: 12345)
    assert memory.free_bytes(CPU) == 12345, "a container may have less than the machine"


@pytest.mark.parametrize(
    ("device", "free_bytes", "windows", "tokens", "expected"),
    [
        (GPU, 2**40, 64, 512, 16),  # a quarter of all
        (GPU, 2**40, 1024, 512, 64),  # 32,768 tokens
        (CPU, 2**40, 64, 256, 4),  # 1,024 tokens
        (CPU, 2**40, 64, 4096, 1),
        (CPU, 2**40, 5, 16, 2),
        (CPU, 2**40, 1, 16, 1),
        (GPU, 0, 64, 512, 1),
    ],
)
def test_windows_at_once(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, free_bytes: int, windows: int, tokens: int, expected: int
) -> None:
    free(monkeypatch, free_bytes)
    config = small_stack().model.config
    assert memory.windows_at_once(config, windows, tokens, device, 4) == expected


def test_windows_at_once_stay_in_a_tenth_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_stack().model.config  # hidden 32, MLP 48: 400 values for a token
    for limit in (1, 3, 7):
        free(monkeypatch, 10 * limit * 24 * 400 * 4)
        assert memory.windows_at_once(config, 64, 24, GPU, 4) == limit
    free(monkeypatch, 10**7)
    sdpa, eager = (
        memory.windows_at_once(plain("llama", attention=kind).config, 64, 64, GPU, 4) for kind in ("sdpa", "eager")
    )
    assert sdpa > eager, "eager attention holds its scores"


def test_the_evaluator_follows_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, windows = small_stack(), random_windows(8)
    seen: dict[str, Any] = {}
    for name, count in (("little", 10 * 24 * 400 * 4), ("much", 2**30)):
        monkeypatch.setattr("orthorank.stack.resources.free_bytes", lambda device, count=count: count)
        evaluator = Evaluator(stack, windows)
        seen[name] = evaluator.batch_size, evaluator.memory, evaluator.loss({3: 0.5})
    assert seen["little"][:2] == (1, 10 * 24 * 400)
    assert seen["much"][:2] == (2, 2**28)
    assert seen["little"][2] == pytest.approx(seen["much"][2], rel=1e-5)


@pytest.mark.parametrize("fast", [False, True])
def test_the_command_s_budget(tiny_folder: Path, tmp_path: Path, fast: bool) -> None:
    """``--memory`` in GiB; what is kept changes nothing but the time."""
    job = prepare(settings(tiny_folder, tmp_path / "job", memory=0.5), SilentScreen(), OneProcess())
    assert job.evaluator.memory == 2**29
    for name, memory_in_gib in (("all", None), ("nothing", 0.0)):
        run_search(settings(tiny_folder, tmp_path / name, memory=memory_in_gib, fast=fast, layers=3))
    everything, nothing = plan_in(tmp_path / "all"), plan_in(tmp_path / "nothing")
    assert everything["layers"] == nothing["layers"]
    assert everything["calibration"]["losses"] == nothing["calibration"]["losses"]
    with pytest.raises(OrthoRankError, match=r"memory is -1; it must be 0 \(keep nothing\) or more, in GiB"):
        settings(tiny_folder, tmp_path, memory=-1.0)


def test_the_command_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["search", "--memory", "-2", "--output", str(tmp_path)]) == 2
    assert "memory is -2; it must be 0" in capsys.readouterr().err
