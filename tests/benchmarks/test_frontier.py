"""The frontier's texts have nothing in common, and its paths are what a plain loop lays."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.bench_zeroshot import row_of
from benchmarks.frontier.curve import at_share, compared
from benchmarks.frontier.path import Path_, lay
from benchmarks.frontier.texts import FIRST_TO_FIT, SHARED, Sizes, check_apart, read_windows
from orthorank import OrthoRankError
from orthorank.models import load_model
from orthorank.stack.evaluator import Evaluator
from tests.orthorank.plain_search import LAYERS, plain_loss, random_windows, small_stack

DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"the texts are not at {DATA}")


def test_what_was_fitted_to_is_not_measured() -> None:
    """One run of tokens in common is enough, wherever it stands."""
    draw = torch.Generator().manual_seed(0)
    fitted, test = (torch.randint(0, 1000, (3, 64), generator=draw) for _ in range(2))
    check_apart(fitted, test, "a text")
    test[1, 20 : 20 + SHARED] = fitted[2, 5 : 5 + SHARED]
    with pytest.raises(OrthoRankError, match="window 1 of a text has 24 tokens from position 20 on"):
        check_apart(fitted, test, "a text")
    test[1, 20 + SHARED - 1] += 1
    check_apart(fitted, test, "a text")


@needs_data
@pytest.mark.slow
def test_the_windows_of_the_frontier() -> None:
    """As many as the protocol says, of two kinds in turn; C4 documents are fitted to from 600 on."""
    _, tokenizer, _ = load_model(device="cpu", dtype="float32")
    windows = read_windows(tokenizer, DATA, Sizes())
    assert windows.fit.numel() == 8192
    assert windows.judge.numel() == 4096
    assert {name: list(ids.shape) for name, ids in windows.test.items()} == {
        "WikiText-2": [32, 1024],
        "C4": [32, 1024],
        "speeches": [32, 1024],
    }
    lines = (DATA / "c4" / "c4_sample.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[FIRST_TO_FIT])["text"].startswith(tokenizer.decode(windows.judge[1, :20]))
    assert json.loads(lines[0])["text"].startswith(tokenizer.decode(windows.test["C4"][0, :20]))
    with pytest.raises(OrthoRankError, match="what is measured must not be what was fitted to"):
        check_apart(windows.test["C4"][:2, :512], windows.test["C4"], "C4")


def test_methods_are_compared_where_their_flops_are_equal() -> None:
    dense = {"flops": 1.0, "losses": {"a text": [1.0, 2.0]}}
    removed = [dense, {"flops": 0.8, "losses": {"a text": [2.0, 4.0]}}]
    selected = [dense, {"flops": 0.84, "losses": {"a text": [1.2, 2.4]}}, {"flops": 0.8, "losses": {"a text": [2, 3]}}]
    assert at_share(removed, 0.82) == {"a text": pytest.approx([1.9, 3.8])}
    assert at_share(removed, 0.9) is None, "no plan is near"
    assert at_share(removed, 0.8) == {"a text": [2.0, 4.0]}
    assert at_share(removed, 0.79) is None
    first, second = compared({"removed": removed, "selected": selected, "mixed": [dense]}, 0.82)
    assert "against_removed" not in first
    assert second["method"] == "selected"
    # 1.6 and 2.7 against 1.9 and 3.8
    assert second["against_removed"]["a text"]["difference"] == pytest.approx(-0.7)
    assert second["perplexity"]["a text"] == pytest.approx(math.exp(2.15), abs=1e-3)


def test_zero_shot_rows_are_in_per_cent_and_paired() -> None:
    def of(*scores: list[float]) -> dict[str, list[dict[str, object]]]:
        names = ("piqa_offline", "arc_easy_offline")
        rows = [
            {"task": name, "metric": "acc", "rows": len(each), "value": sum(each) / len(each), "scores": each}
            for name, each in zip(names, scores, strict=True)
        ]
        return {"tasks": rows}

    dense, plan = of([1, 1, 0, 1], [1, 0]), of([1, 0, 0, 0], [1, 0])
    row = row_of("removed", 0.80444, plan, dense)
    assert (row["tasks"], row["mean"], row["flops"]) == ({"piqa": 25.0, "arc_easy": 50.0}, 37.5, 0.8044)
    # -0.5 with an error of 0.2887 on one of two tasks, nothing on the other
    assert row["against_dense"] == {"mean": -25.0, "standard_error": 14.43}


def costs(plan: dict[int, float]) -> float:
    """A removed layer saves three times as much as one that selects."""
    return 1 - sum(0.12 if ratio == 0 else 0.04 for ratio in plan.values())


def laid(tmp_path: Path, ratios: dict[int, list[float]], until: float, path: Path_ | None = None) -> Path_:
    found = path or Path_("")
    evaluator = Evaluator(small_stack(), random_windows(), batch_size=1)
    lay(evaluator, found, ratios, costs, until=until, first=2, file=tmp_path / "path", say=lambda _: None)
    return found


def test_a_round_takes_the_change_that_costs_least_for_what_it_saves(tmp_path: Path) -> None:
    """Four changes or fewer all see every window, so the loop is exact."""
    ratios = {2: [0.4, 0.0], 4: [0.4, 0.0]}
    found = laid(tmp_path, ratios, 0.8)
    stack, windows = small_stack(), random_windows()
    plan: dict[int, float] = {}
    for change in found.changes:
        before, flops = plain_loss(stack, windows, plan), costs(plan)
        prices = {
            (layer, ratio): (plain_loss(stack, windows, plan | {layer: ratio}) - before)
            / (flops - costs(plan | {layer: ratio}))
            for layer, values in ratios.items()
            for ratio in values
            if ratio < plan.get(layer, 1.0)
        }
        assert change == min(prices, key=lambda each: prices[each])
        plan |= dict([change])
    assert found.flops[-1] <= 0.8 < found.flops[-2]
    assert found.losses[-1] == pytest.approx(plain_loss(stack, windows, plan), abs=1e-6)


def test_a_path_goes_on(tmp_path: Path) -> None:
    ratios = {layer: [0.4] for layer in range(1, LAYERS - 1)}
    (tmp_path / "whole").mkdir()
    whole = laid(tmp_path / "whole", ratios, 0.84)
    laid(tmp_path, ratios, 0.92)
    part = Path_.load(tmp_path / "path", "")
    assert laid(tmp_path, ratios, 0.84, part).changes == whole.changes
    assert part.losses == whole.losses
    with pytest.raises(OrthoRankError, match="is of other windows or settings"):
        Path_.load(tmp_path / "path", "others")


def test_a_layer_that_selects_may_be_removed_later(tmp_path: Path) -> None:
    found = laid(tmp_path, {3: [0.4, 0.0]}, 0.0)
    assert found.changes in ([(3, 0.4), (3, 0.0)], [(3, 0.0)])
    assert found.plan() == {3: 0.0}
