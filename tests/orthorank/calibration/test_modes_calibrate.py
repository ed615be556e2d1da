"""Thresholds found on text: between two scores, layer on layer, and from the command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply, cli
from orthorank.calibration.threshold import threshold_for
from orthorank.calibration.thresholds import calibrate
from tests.orthorank import statement

WINDOWS, TOKENS = 3, 40


@pytest.fixture
def ids() -> Tensor:
    """No id twice: equal tokens can have equal scores, between which there is no threshold."""
    return torch.randperm(125, generator=torch.Generator().manual_seed(0))[: WINDOWS * TOKENS].view(WINDOWS, TOKENS) + 3


def updated_in(model: Any, plan: OrthoRankConfig, ids: Tensor) -> dict[int, int]:
    with apply(model, plan) as handle, torch.no_grad():
        model(ids, use_cache=False)
        return {layer: handle.stats[layer].tokens_updated for layer in plan.selecting}


def test_every_layer_updates_the_wanted_share(tiny_model: Any, family: str, ids: Tensor) -> None:
    model = tiny_model(family)
    plan = OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=0.3, keep_ratios={1: 0.75, 2: 0.0})
    found = calibrate(model, ids, plan, decode="threshold", keep_last=0, batch_size=3)  # as below: no score moves
    assert updated_in(model, found, ids) == {0: 36, 1: 90, 3: 36}
    assert found.calibration["thresholds"]["achieved"] == {"0": 0.3, "1": 0.75, "3": 0.3}
    assert (found.select, found.decode, found.keep_last, found.ratios) == ("threshold", "threshold", 0, plan.ratios)
    assert OrthoRankConfig.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_threshold_is_halfway_between_two_scores_of_the_states_it_meets(tiny_model: Any, ids: Tensor) -> None:
    """By the naive statement: of all tokens' scores in the layer, under the lower layers' thresholds."""
    model = tiny_model("llama")
    found = calibrate(model, ids, OrthoRankConfig(layers=[1, 2], keep_ratio=0.3))
    seen: list[Tensor] = []

    def watched(scores: Tensor) -> Tensor:
        seen.append(scores[1:])
        return statement.below(found.thresholds[2])(scores)

    for row in ids:
        statement.logits_by_rule(model, row[None], {1: statement.below(found.thresholds[1]), 2: watched})
    low, high = torch.cat(seen).sort().values[35:37].tolist()  # 36 of 120 tokens are below it
    assert found.thresholds[2] == pytest.approx((low + high) / 2, rel=1e-5)
    assert low < found.thresholds[2] < high


@pytest.mark.parametrize(
    "options",
    [
        {"criterion": "inverse"},
        {"criterion": "random", "seed": 5},
        {"criterion": "cosine"},
        {"criterion": "prenorm"},
        {"update_sink": True},
        {"sinks": "auto"},
        {"kv": "selected"},
    ],
)
def test_whatever_ranks_the_tokens(tiny_model: Any, ids: Tensor, options: dict[str, Any]) -> None:
    model = tiny_model("llama")
    found = calibrate(model, ids, OrthoRankConfig(layers=[1, 2], keep_ratio=0.3, **options))
    assert updated_in(model, found, ids) == {1: 36, 2: 36}


def test_batches_and_the_plan_change_nothing_else(tiny_model: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    plan = OrthoRankConfig(
        layers=[1, 2], keep_last=3, select="window", select_window=8, calibration={"a": 1}, measured={"b": 2}
    )
    steps: list[tuple[int, int, float | None]] = []
    found = calibrate(model, ids, plan, keep_ratio=0.5, batch_size=2, on_layer=lambda *step: steps.append(step))
    assert (found.keep_ratio, found.keep_last, found.decode, found.select_window) == (0.5, 3, "dense", None)
    assert (found.calibration["a"], found.measured) == (1, {})
    assert steps == [(1, 3, None), (2, 3, found.thresholds[1]), (3, 3, found.thresholds[2])]
    whole = calibrate(model, ids, plan, keep_ratio=0.5, batch_size=3)
    assert whole.thresholds == pytest.approx(found.thresholds, rel=1e-5)
    again = calibrate(model, ids, found, keep_ratio=0.5, batch_size=3)
    assert again.thresholds == whole.thresholds, "a plan with thresholds is calibrated anew"


def test_neighbours_in_float32_are_told_apart() -> None:
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    threshold, below = threshold_for(torch.stack([high, low, high + 1]), 1)
    assert below == 1
    assert low < torch.tensor(threshold) <= high
    assert threshold_for(torch.tensor([1.0, 2.0, torch.inf, torch.inf]), 2)[0] > 2
    assert threshold_for(torch.tensor([-3.0, -3.0, -1.0, torch.nan]), 1) == (-2.0, 2)
    with pytest.raises(OrthoRankError, match=r"all 2 scores are 1\.0"):
        threshold_for(torch.ones(2), 1)


@pytest.mark.parametrize(
    ("plan", "tokens", "words"),
    [
        ({"layers": []}, 40, r"the plan selects in no layer \(layers \[\]"),
        ({"layers": [1], "keep_ratio": 0}, 40, "thresholds are for layers whose ratio is above 0 and below 1"),
        ({"layers": [1], "keep_ratio": 0.01}, 8, "layer 1 is to update 0.01 of 24 calibration tokens, of which 21"),
        ({"layers": [1], "keep_ratio": 0.99}, 8, "no sinks: 23 below a threshold"),
        ({"layers": [1], "num_hidden_layers": 9}, 40, "the plan was made for a model with num_hidden_layers 9"),
        ({"layers": [1]}, 1, r"input_ids has shape \[3, 1\]"),
    ],
)
def test_what_cannot_be_calibrated(tiny_model: Any, ids: Tensor, plan: dict[str, Any], tokens: int, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        calibrate(tiny_model("llama"), ids[:, :tokens], OrthoRankConfig(**plan))


def test_training_mode_is_refused(tiny_model: Any, ids: Tensor) -> None:
    with pytest.raises(OrthoRankError, match="model is in training mode"):
        calibrate(tiny_model("llama").train(), ids, OrthoRankConfig(layers=[1]))


@pytest.fixture
def orthorank(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(f"{i * i} is the square of {i}." for i in range(300)))
    return file


def test_the_command(orthorank: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    plan = OrthoRankConfig(layers=[2, 3, 4], keep_ratios={3: 0.0}).save_pretrained(tmp_path / "given")
    out = tmp_path / "out"
    code, words, err = orthorank(
        *("calibrate", str(tiny_folder), "--plan", str(plan), "--text", str(text), "--text", str(text)),
        *("--keep-ratio", "1/4", "--windows", "3", "--window", "64", "--device", "cpu", "--output", str(out)),
    )
    assert (code, err) == (0, "")
    found = OrthoRankConfig.from_pretrained(out)
    assert (found.selecting, found.keep_ratio, found.select, found.decode) == ([2, 4], 0.25, "threshold", "dense")
    assert found.calibration["thresholds"]["achieved"] == {"2": 0.25, "4": 0.25}
    assert found.calibration["thresholds"]["text"] == f"{text}, {text}"
    assert set(found.measured["achieved"]) == {"2", "4"}
    assert found.measured["perplexity"] > 1
    line = next(line.split() for line in words.splitlines() if line.split()[:1] == ["4"])
    assert line[1:4] == ["0.2500", f"{found.thresholds[4]:.6g}", "0.2500"]
    assert "Generated tokens are dense; with --decode threshold" in words
    assert f"use it with orthorank demo {tiny_folder} --plan {out}" in " ".join(words.split())
    assert "the last 1 of the prompt are always updated" in " ".join(words.split())
    with apply_to(tiny_folder, found) as handle, torch.no_grad():
        handle.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)


def apply_to(folder: Path, plan: OrthoRankConfig) -> Any:
    from orthorank.models import load_model

    return apply(load_model(str(folder), "cpu")[0], plan)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--keep-ratio", "2"], "keep_ratio is 2.0; it must be from 0"),
        (["--decode", "sparse"], "decode is 'sparse'; it may be 'dense' or 'threshold'"),
        (["--keep-last", "-1"], "keep_last is -1; it must be an integer, 0 or more"),
        (["--plan", "no-such-plan"], "no plan can be read at no-such-plan"),
        (["--text", "no-such-file"], "text 'no-such-file' cannot be read"),
        (["--window", "5000"], "window is 5000; the model's longest input has 512 tokens"),
        (["--window", "500", "--windows", "900"], "is too short: it has"),
        (["--plan", "default"], "no plan is shipped for"),
    ],
)
def test_the_command_says_what_is_wrong(
    orthorank: Any, tiny_folder: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    given = OrthoRankConfig(layers=[2]).save_pretrained(tmp_path / "given")
    fixed = ["calibrate", str(tiny_folder), "--output", str(tmp_path / "out"), "--device", "cpu", "--plan", str(given)]
    code, out, err = orthorank(*fixed, *arguments)
    assert code == 2
    begun = " ".join(out.split())
    assert not begun or (begun.startswith("loading ") and begun.endswith(" ...") and begun.count("...") == 1), out
    assert sentence in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out" / "orthorank.json").exists()
