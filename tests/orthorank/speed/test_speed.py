"""Timing of prefills: who runs when, what is paired with what, and that the model is left alone."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank
from orthorank.common.errors import OrthoRankError
from orthorank.speed import timing as speed
from orthorank.speed.timing import Timing, time_prefill

PLAN = orthorank.OrthoRankConfig(layers=[1, 2], keep_ratio=0.25)


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


def test_variants_take_turns(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interleaved in a rotating order, warm-up left out, ratios taken within a round."""
    ran: list[str] = []
    clock = iter(range(1, 100))

    def fake(run: Any) -> float:
        handle = orthorank.handle_of(model)
        ran.append("dense" if handle is None else handle.config.criterion)
        run()
        return float(next(clock))

    monkeypatch.setattr(speed, "_wall_seconds", fake)
    other = orthorank.OrthoRankConfig(layers=[1], criterion="inverse")
    variants = {"a": None, "b": PLAN, "c": other}
    rounds: list[tuple[int, int]] = []
    report = time_prefill(
        model,
        variants,
        torch.arange(24).view(2, 12),
        rounds=3,
        warmup=1,
        on_round=lambda done, total: rounds.append((done, total)),
    )
    a, b, c = "dense", "orthogonal", "inverse"
    assert ran == [c, a, b, a, b, c, b, c, a, c, a, b]
    assert report.timings["a"].seconds == (4.0, 9.0, 11.0)
    assert report.timings["b"].seconds == (5.0, 7.0, 12.0)
    assert report.timings["b"].speedups == (4 / 5, 9 / 7, 11 / 12)
    assert report.timings["b"].speedup == 11 / 12
    assert report.timings["a"].speedups == (1.0, 1.0, 1.0)
    assert report.timings["a"].tokens_per_second == 24 / 9
    assert rounds == [(1, 3), (2, 3), (3, 3)]
    assert (report.clock, report.device, report.dtype, report.batch, report.prompt) == (
        "wall clock",
        "cpu",
        "float32",
        2,
        12,
    )
    assert report.to_dict()["timings"]["b"]["speedup"] == 11 / 12


def test_the_plan_is_applied_and_taken_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    updated: list[int] = []

    def look(run: Any) -> float:
        run()
        handle = orthorank.handle_of(model)
        updated.append(0 if handle is None else handle.stats[2].tokens_updated)
        return 1.0

    monkeypatch.setattr(speed, "_wall_seconds", look)
    time_prefill(model, {"dense": None, "plan": PLAN}, torch.arange(20)[None], rounds=2, warmup=0)
    assert updated == [0, 5, 5, 0], "a quarter of 20 tokens"
    assert orthorank.handle_of(model) is None


def test_logits_to_keep(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[int] = []
    model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    time_prefill(model, {"dense": None}, torch.arange(20)[None], rounds=1, warmup=0)
    time_prefill(model, {"dense": None}, torch.arange(20)[None], rounds=1, warmup=0, logits_to_keep=0)
    assert shapes == [1, 20]


def test_wall_clock_measures_the_run() -> None:
    import time

    assert 0.02 <= speed._wall_seconds(lambda: time.sleep(0.02)) < 2


def test_summary_figures() -> None:
    timing = Timing((1.0, 2.0, 3.0, 4.0, 100.0), 300, (2.0, 1.0, 3.0, 2.5, 2.2))
    assert timing.median == 3
    assert timing.tokens_per_second == 100
    assert timing.spread == pytest.approx((4 - 2) / 2 / 3)
    assert timing.speedup == 2.2
    assert timing.speedup_spread == pytest.approx(0.25)
    assert Timing((1.0,), 1, (1.0,)).spread == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variants": {}}, "variants is empty"),
        ({"rounds": 0}, "rounds is 0"),
        ({"warmup": -1}, "warmup is -1"),
        ({"logits_to_keep": -1}, "logits_to_keep is -1"),
        ({"input_ids": torch.arange(4)}, r"input_ids has shape \[4\]"),
        ({"variants": {"plan": orthorank.OrthoRankConfig(layers=[9])}}, "layers holds 9"),
    ],
)
def test_errors(model: Any, arguments: dict[str, Any], words: str) -> None:
    defaults: dict[str, Any] = {"variants": {"dense": None}, "input_ids": torch.arange(4)[None]}
    with pytest.raises(OrthoRankError, match=words):
        time_prefill(model, **(defaults | arguments))


@pytest.mark.slow
def test_the_prefill_benchmark_ends_with_its_ratio(tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "benchmarks" / "bench_prefill.py"
    options = ["--rounds", "1", "--tokens", "64", "--layers", "12", "14", "--json", str(tmp_path / "result.json")]
    done = subprocess.run([sys.executable, script, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert float(done.stdout.split()[-1]) == pytest.approx(result["measured_over_ideal"], abs=0.0006)
    assert result["measured_over_ideal"] == pytest.approx(result["measured_speedup"] / result["flop_speedup"])
    assert result["layers"] == [12, 14]
    wrong = subprocess.run([sys.executable, script, "--layers", "30"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[-1] == "bench_prefill: layers holds 30; the model has layers 0 to 29"
