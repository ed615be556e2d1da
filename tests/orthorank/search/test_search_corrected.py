"""Searches with maps: every plan is judged with maps of its own, as if it were fitted and applied by itself."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply, fit_correction
from orthorank.calibration.corrected_evaluator import CorrectedEvaluator
from orthorank.cli import main
from orthorank.common.files import read_json
from orthorank.evaluation import perplexity
from orthorank.search import greedy_search
from orthorank.search.run import run_search
from orthorank.stack.layers import LayerStack
from tests.orthorank.plain_search import LAYERS, random_windows, small_stack
from tests.orthorank.search_runs import Watcher, settings, short_text

RANK = 6
CANDIDATES = range(1, LAYERS - 1)


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    return small_stack()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return random_windows(4)


@pytest.fixture(scope="module")
def fit_ids() -> Tensor:
    return random_windows(20)[4:]


def stated(stack: LayerStack, windows: Tensor, fit_ids: Tensor, ratios: dict[int, float]) -> float:
    """Maps by `fit_correction`, the plan applied, the loss of the patched model."""
    plan = OrthoRankConfig(layers=list(ratios), keep_ratios=ratios)
    with apply(stack.model, fit_correction(stack.model, fit_ids, plan, rank=RANK, batch_size=1)):
        return perplexity(stack.model, windows).loss


@pytest.mark.parametrize(
    "ratios",
    [{2: 0.4}, {3: 0.0}, {1: 0.4, 3: 0.4, 5: 0.4}, {1: 0.0, 2: 0.0, 4: 0.0}, {1: 0.4, 2: 0.0, 5: 0.5}],
)
def test_a_loss_is_that_of_the_plan_fitted_and_applied(
    stack: LayerStack, windows: Tensor, fit_ids: Tensor, ratios: dict[int, float]
) -> None:
    evaluator = CorrectedEvaluator(stack, windows, fit_ids, rank=RANK, batch_size=1)
    expected = stated(stack, windows, fit_ids, ratios)
    assert evaluator.loss(ratios) == pytest.approx(expected, abs=2e-5)
    assert evaluator.loss(ratios, limit=expected / 2) == math.inf
    assert evaluator.loss({}) == pytest.approx(perplexity(stack.model, windows).loss, abs=2e-5)


@pytest.mark.parametrize(("keep_ratio", "memory"), [(0.0, 0), (0.0, None), (1 / 3, None)])
def test_greedy_is_the_loop_written_down(
    stack: LayerStack, windows: Tensor, fit_ids: Tensor, keep_ratio: float, memory: int | None
) -> None:
    """Each candidate fitted and applied by itself, the best one taken; whatever states and maps are kept meanwhile."""
    evaluator = CorrectedEvaluator(
        stack, windows, fit_ids, rank=RANK, keep_ratio=keep_ratio, batch_size=2, memory=memory
    )
    found = greedy_search(evaluator, CANDIDATES, 3)
    assert memory is None or evaluator._fit_states.bytes == 0, "nothing is kept of the fit's windows, either"
    chosen: list[int] = []
    losses = []
    for _ in range(3):
        plans = {i: dict.fromkeys([*chosen, i], keep_ratio) for i in CANDIDATES if i not in chosen}
        scores = {i: stated(stack, windows, fit_ids, plan) for i, plan in plans.items()}
        chosen.append(min(scores, key=lambda i: scores[i]))
        losses.append(scores[chosen[-1]])
    assert found.chosen == chosen
    assert found.losses == pytest.approx(losses, abs=2e-5)


def test_the_same_bits_whatever_is_kept(stack: LayerStack, windows: Tensor, fit_ids: Tensor) -> None:
    plans = [{1: 0.4}, {1: 0.4, 4: 0.4}, {2: 0.4, 4: 0.4}, {1: 0.4, 4: 0.4}, {1: 0.4, 2: 0.0, 4: 0.4}]
    once = [CorrectedEvaluator(stack, windows, fit_ids, rank=RANK, batch_size=1).loss(plan) for plan in plans]
    evaluator = CorrectedEvaluator(stack, windows, fit_ids, rank=RANK, batch_size=1)
    evaluator.start({4: 0.4})
    assert [evaluator.loss(plan) for plan in plans] == once
    assert {layer: found.layer_map.down.shape for layer, found in evaluator.maps(plans[0]).items()} == {1: (RANK, 32)}


def test_without_refitting_the_maps_above_are_those_of_the_plan_before(
    stack: LayerStack, windows: Tensor, fit_ids: Tensor
) -> None:
    """The new layer has a map of its own, and the others keep theirs until the round is won."""
    evaluator = CorrectedEvaluator(stack, windows, fit_ids, rank=RANK, batch_size=1, refit=False)
    exact = CorrectedEvaluator(stack, windows, fit_ids, rank=RANK, batch_size=1)
    evaluator.start({4: 0.4})
    before, own = evaluator.maps({4: 0.4}), exact.maps({2: 0.4})
    found = evaluator.maps({2: 0.4, 4: 0.4})
    for layer, expected in ((4, before[4]), (2, own[2])):
        assert all(map(torch.equal, found[layer].layer_map, expected.layer_map))
    assert not torch.equal(found[4].layer_map.down, exact.maps({2: 0.4, 4: 0.4})[4].layer_map.down)
    assert evaluator.loss({2: 0.4, 4: 0.4}) != exact.loss({2: 0.4, 4: 0.4})
    evaluator.start({2: 0.4, 4: 0.4})
    assert evaluator.loss({2: 0.4, 4: 0.4}) == exact.loss({2: 0.4, 4: 0.4})


@pytest.mark.parametrize("fast", [False, True])
def test_a_search_that_goes_on(stack: LayerStack, windows: Tensor, fit_ids: Tensor, tmp_path: Path, fast: bool) -> None:
    from orthorank.search import SearchInterrupted, SearchState

    def evaluator() -> CorrectedEvaluator:
        return CorrectedEvaluator(stack, windows, fit_ids, rank=RANK, batch_size=1, refit=not fast)

    def stop(number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    whole = greedy_search(evaluator(), CANDIDATES, 2, fast=fast)
    with pytest.raises(SearchInterrupted):
        greedy_search(evaluator(), CANDIDATES, 2, fast=fast, on_evaluation=stop, save_to=tmp_path / "state")
    again = greedy_search(evaluator(), CANDIDATES, 2, fast=fast, state=SearchState.load(tmp_path / "state"))
    assert again.chosen == whole.chosen
    assert again.losses == whole.losses


def test_another_fit_is_another_search(stack: LayerStack, windows: Tensor, fit_ids: Tensor) -> None:
    def of(**changes: Any) -> str:
        given: dict[str, Any] = {"fit_ids": fit_ids, "rank": RANK} | changes
        return CorrectedEvaluator(stack, windows, **given).fingerprint

    others = [of(), of(rank=5), of(refit=False), of(fit_ids=fit_ids[:8]), of(keep_ratio=0.5)]
    assert len(set(others)) == len(others)
    for change, message in (({"rank": 33}, "rank is 33"), ({"fit_ids": fit_ids[:1]}, "at least 2 windows")):
        with pytest.raises(OrthoRankError, match=message):
            of(**change)


@pytest.mark.parametrize("fast", [False, True])
def test_the_command_writes_a_corrected_plan(tiny_folder: Path, tmp_path: Path, fast: bool) -> None:
    results = run_search(settings(tiny_folder, tmp_path, correct=RANK, windows=4, fast=fast))
    plan = OrthoRankConfig.from_pretrained(tmp_path)
    assert plan.correction is not None
    assert (plan.correction.rank, plan.correction.layers) == (RANK, plan.layers)
    record = plan.calibration["correction"]
    assert (record["windows"], plan.calibration["windows"], plan.calibration["fit_windows"]) == (12, 4, 8)
    assert record["ids_sha256"] not in (plan.calibration["ids_sha256"], plan.calibration["fit_ids_sha256"])
    assert f"maps of rank {RANK}" in plan.calibration["method"]
    assert results["rows"][1]["name"] == "OrthoRank, corrected"
    assert results["rows"][1]["perplexity"] == plan.measured["perplexity"] < math.inf
    assert read_json(tmp_path / "search.json")["search"]["correct"] == RANK


def test_an_interrupted_search_goes_on_to_the_same_plan(tiny_folder: Path, tmp_path: Path) -> None:
    whole = settings(tiny_folder, tmp_path / "whole", correct=RANK, windows=4)
    run_search(whole)
    part = dataclasses.replace(whole, output=tmp_path / "part", resume=True)
    with pytest.raises(OrthoRankError, match="interrupted after 5 of 7 evaluations"):
        run_search(part, Watcher("search", 5))
    run_search(part)
    first, second = (OrthoRankConfig.from_pretrained(tmp_path / name) for name in ("whole", "part"))
    assert first.correction == second.correction
    with pytest.raises(OrthoRankError, match="its correct is 6 and now it is 7"):
        run_search(dataclasses.replace(part, correct=7))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--correct", "0"], "correct is 0"),
        (["--correct", "65", "--layers", "1", "--no-sink-floor"], "rank is 65; it must be an integer from 1 to 64"),
        (["--correct", "4", "--method", "influence"], "correct is for the method greedy"),
        (["--fit-windows", "4"], "fit_windows is for a search with maps"),
        (["--correct", "4", "--fit-windows", "1"], "fit_windows is 1"),
    ],
)
def test_what_is_refused(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    small = ["--text", str(short_text(tiny_folder)), "--window", "32", "--windows", "2", "--device", "cpu"]
    assert main(["search", str(tiny_folder), *small, "--output", str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
