"""Measuring launch settings: what is tried, what wins, what is kept, and that nothing is measured without being asked.

No GPU: the clock is given. What a launch would take comes from the settings that the look-up gives at that moment.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank_kernels import cli
from orthorank_kernels import op as _library
from orthorank_kernels.dispatch import interpreting
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.tuning import problems as tuning_problems
from orthorank_kernels.tuning import tune as tuning
from tests.orthorank_kernels.tools import poisoned_outputs, set_settings

OP = "sparse_query_attention"
KIND = "16-bit, head_dim 128"
GPU = "sm_90 NVIDIA Test 90"
ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")


class Clock:
    """In place of `timing.milliseconds`: the time of each setting, and the result it gives."""

    def __init__(self, cost: Callable[[Any], float], result: Callable[[Any], torch.Tensor | None] | None = None):
        self.cost, self.result = cost, result or (lambda settings: torch.ones(3))
        self.asked: list[Any] = []

    def __call__(self, run: Any) -> tuple[torch.Tensor | None, float]:
        settings = dict(_settings.look_up(OP, self.kind, GPU))
        self.asked.append(settings)
        return self.result(settings), self.cost(settings)

    kind = KIND


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ORTHORANK_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("ORTHORANK_AUTOTUNE", raising=False)
    _settings.forget()
    yield
    _settings.forget()


@pytest.fixture
def at_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[[Clock], Clock]:
    """A GPU as far as tuning can see, with the given clock."""

    def use(clock: Clock) -> Clock:
        parts = {"configs.target_of": lambda device: GPU, "timing.milliseconds": clock}
        monkeypatch.setattr(_library, "launcher", lambda path: parts[path])
        monkeypatch.setattr(tuning.tuning_problems, "problem", lambda op, kind, device: None)
        monkeypatch.setattr(tuning, "triton_unavailable", lambda device: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return clock

    return use


TARGETS = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", _settings.kinds(OP))
def test_candidates_are_distinct_begin_with_the_default_and_fit(kind: str, target: str) -> None:
    found = [dict(c) for c in tuning.candidates(OP, kind, target)]
    assert found[0] == _settings.default(OP, kind, target)
    assert len(found) > 1, "a search needs something to search"
    assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found)
    assert len(found) <= 60, "each is compiled, for seconds"
    dim = int(kind.split("head_dim ")[1].split(",")[0])
    size = int(kind.split("-")[0]) // 8
    for c in found[1:]:
        assert c.keys() == found[0].keys()
        assert (
            c["num_stages"] * 2 * c["block_n"] * dim * size
            <= tuning_problems.SHARED_KIB[_settings.family(target)] << 10
        )


@pytest.mark.parametrize(
    ("target", "kind", "tile"),
    [
        ("sm_80", "16-bit, head_dim 128", (128, 128, 4, 2)),  # 15,305 spills
        ("sm_90", "16-bit, head_dim 128", (128, 128, 4, 2)),  # 28 spills in the loop
        ("sm_80", "16-bit, head_dim 128", (128, 128, 8, 4)),  # 4 stages of 64 KiB
        ("sm_90", "16-bit, head_dim 128", (128, 128, 8, 4)),
    ],
)
def test_what_is_known_to_lose_is_not_compiled(target: str, kind: str, tile: tuple[int, ...]) -> None:
    names = ("block_m", "block_n", "num_warps", "num_stages")
    assert tile not in [tuple(c[n] for n in names) for c in tuning.candidates(OP, kind, target)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", _settings.FIELDS)
def test_candidates_of_every_op_are_legal_and_distinct(op: str, target: str) -> None:
    for kind in _settings.kinds(op):
        found = [dict(c) for c in tuning.candidates(op, kind, target)]
        assert found[0] == _settings.default(op, kind, target)
        assert 1 < len(found) <= 60, kind
        assert len({json.dumps(c, sort_keys=True) for c in found}) == len(found)
        for c in found:
            _settings._check(op, kind, c)
            assert c.get("num_warps", 1) <= (16 if target.startswith("gfx") else 32)


def test_every_op_with_settings_has_a_problem() -> None:
    assert tuning_problems.PROBLEMS.keys() == _settings.FIELDS.keys()


SMALL = {
    "ROWS": 1,
    "LENGTH": 48,
    "TOKENS": 96,
    "KV_HEADS": 1,
    "HIDDEN": 32,
    "SCORES": {"short": 40, "long": 2100, "streamed": 8300, "packed": 40},
    "FUSED": {"short": 40, "streamed": 100, "packed": 40, "threshold": 40},
}
PROBLEMS = [(op, kind) for op in _settings.FIELDS for kind in _settings.kinds(op)]


@pytest.mark.skipif(not interpreting(), reason="small launches, in Triton's interpreter")
@pytest.mark.parametrize(("op", "kind"), PROBLEMS)
def test_what_is_timed_takes_the_settings_of_its_kind(op: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives the same numbers every time, which is how candidates are compared."""
    for name, value in SMALL.items():
        monkeypatch.setattr(tuning_problems, name, value)
    if op == "combine_splits":
        monkeypatch.setattr(tuning_problems, "TOKENS", 256)  # or no keys are split
    set_settings(monkeypatch, "rms_norm_select", {"short rows": {"tokens": 64}})
    asked = []
    look_up = _settings.look_up
    monkeypatch.setattr(_settings, "look_up", lambda *at: asked.append(at[:2]) or look_up(*at))
    run = tuning_problems.problem(op, kind, CPU)
    with poisoned_outputs():
        first, again = run(), run()
    assert (op, kind) in asked
    assert torch.equal(first, again)
    assert torch.isfinite(first.float()).all()


def test_the_fastest_wins(at_hand: Any) -> None:
    clock = at_hand(Clock(lambda s: 1.0 + s["block_n"] / 1000 + s["num_warps"]))
    tuned = tuning.tune(OP, KIND, CPU)
    assert clock.asked == [dict(c) for c in tuning.candidates(OP, KIND, GPU)], "each candidate was in force when timed"
    assert tuned.milliseconds == min(clock.cost(s) for s in clock.asked)
    assert clock.cost(tuned.settings) == tuned.milliseconds
    assert tuned.default_milliseconds == clock.cost(clock.asked[0])
    assert _settings.look_up(OP, KIND, "sm_90") == _settings.default(OP, KIND, "sm_90"), "afterwards none is in force"


def test_a_hair_faster_is_not_faster(at_hand: Any) -> None:
    default = _settings.default(OP, KIND, GPU)
    at_hand(Clock(lambda s: 1.0 if s == default else 0.99))
    assert tuning.tune(OP, KIND, CPU).settings == default


@pytest.mark.parametrize("wrong", [None, torch.full((3,), 2.0), torch.full((3,), float("nan"))])
def test_what_cannot_be_launched_or_is_wrong_never_wins(at_hand: Any, wrong: torch.Tensor | None) -> None:
    default = _settings.default(OP, KIND, GPU)
    at_hand(Clock(lambda s: 9.0 if s == default else 1.0, lambda s: torch.ones(3) if s == default else wrong))
    assert tuning.tune(OP, KIND, CPU).settings == default


def test_a_default_that_cannot_be_launched_is_an_error(at_hand: Any) -> None:
    at_hand(Clock(lambda s: 1.0, lambda s: None))
    with pytest.raises(tuning.TuningError, match="cannot launch the default settings"):
        tuning.tune(OP, KIND, CPU)


def test_what_was_measured_is_read_by_the_next_launch_and_added_to(tmp_path: Path) -> None:
    tile = {"block_m": 64, "block_n": 32, "num_stages": 2, "num_warps": 4}
    other = tile | {"block_m": 32}
    tuning.save(OP, "Some GPU", {KIND: tuning.Tuned(tile, 1.0, 2.0)}, tmp_path)
    path = tuning.save(OP, "Some GPU", {"other": tuning.Tuned(other, 3.0, 3.0)}, tmp_path)
    assert path.name == "sparse_query_attention.some-gpu.json"
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == tile
    assert _settings.look_up(OP, "other", "sm_90 Some GPU") == other
    content = json.loads(path.read_text())
    assert content["milliseconds"][KIND] == {"tuned": 1.0, "default": 2.0}
    assert content["versions"]["torch"]
    assert [p.name for p in tmp_path.iterdir()] == [path.name], "no temporary file stays"


def test_nothing_is_measured_without_being_asked_for(at_hand: Any) -> None:
    clock = at_hand(Clock(lambda s: 1.0))
    with pytest.warns(UserWarning, match="orthorank-kernels tune"):
        assert _settings.look_up(OP, KIND, GPU) == _settings.default(OP, KIND, GPU)
    assert not clock.asked


def test_with_autotune_the_first_launch_measures_and_keeps(
    at_hand: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ORTHORANK_AUTOTUNE", "1")
    clock = at_hand(Clock(lambda s: 1.0 + s["block_n"] + s["num_warps"]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = _settings.look_up(OP, KIND, GPU)
    assert clock.cost(first) == min(clock.cost(s) for s in clock.asked) < clock.cost(clock.asked[0])
    measured = len(clock.asked)
    assert _settings.look_up(OP, KIND, GPU) == first
    _settings.forget()  # as in the next process
    assert _settings.look_up(OP, KIND, GPU) == first
    assert len(clock.asked) == measured, "measured once"
    assert (tmp_path / _settings.file_name(OP, "NVIDIA Test 90")).is_file()


def test_autotune_measures_nothing_while_a_graph_is_captured(at_hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHORANK_AUTOTUNE", "1")
    clock = at_hand(Clock(lambda s: 1.0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert _settings.look_up(OP, KIND, GPU) == _settings.default(OP, KIND, GPU)
    assert not clock.asked


def test_autotune_that_fails_costs_no_request(at_hand: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORTHORANK_AUTOTUNE", "1")
    at_hand(Clock(lambda s: 1.0, lambda s: None))
    with pytest.warns(UserWarning, match="the default settings are used"):
        assert _settings.look_up(OP, KIND, GPU) == _settings.default(OP, KIND, GPU)


def test_the_command_writes_what_it_measured(at_hand: Any, capsys: Any, tmp_path: Path) -> None:
    at_hand(Clock(lambda s: 1.0 + s["num_warps"]))
    assert cli.main(["tune", "--op", OP, "--kind", KIND, "--output", str(tmp_path / "new")]) == 0
    path = tmp_path / "new" / _settings.file_name(OP, "NVIDIA Test 90")
    assert list(_settings.read(path, OP)) == [KIND]
    out = capsys.readouterr().out
    assert f"written to {path}" in out
    assert "ms (default" in out


def test_the_command_refuses_without_a_gpu_in_one_sentence() -> None:
    command = [sys.executable, "-m", "orthorank_kernels", "tune"]
    hidden = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=hidden, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("orthorank-kernels: tuning measures on a GPU, and PyTorch")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["tune", "--op", "gather"], "op is 'gather'; ops with launch settings are add_low_rank, apply_rotary_at"),
        (["tune", "--op", OP, "--kind", "8-bit"], "kind is '8-bit'; it may be one of 16-bit, head_dim 64"),
        (["tune", "--device", "gpu"], "device is 'gpu'; it may be cuda or cuda:N"),
        (["tune", "--device", "cpu"], "tuning measures on a GPU"),
        (["frobnicate"], "invalid choice: 'frobnicate'"),
    ],
)
def test_wrong_input_is_exit_code_2(arguments: list[str], sentence: str, capsys: Any) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert sentence in captured.err
    assert not captured.out


def test_help_lists_the_command(capsys: Any) -> None:
    assert cli.main([]) == cli.main(["--help"]) == cli.main(["tune", "--help"]) == 0
    assert "--output" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="measures on a GPU")
def test_a_real_measurement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offered = list(tuning.candidates(OP, KIND, _library.launcher("configs.target_of")(torch.device("cuda"))))[:3]
    monkeypatch.setattr(tuning, "candidates", lambda *_: iter(offered))
    tuned = tuning.tune(OP, KIND, torch.device("cuda"))
    assert 0 < tuned.milliseconds <= tuned.default_milliseconds < 1000
