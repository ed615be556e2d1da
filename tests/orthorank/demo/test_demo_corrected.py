"""The demo's corrected rows: fitted on the calibration windows, compared by windows, kept as plans."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply, fit_correction
from orthorank.common.texts import find_text, take_samples, tokenize
from orthorank.correction import Correction, LayerMap
from orthorank.demo import run_demo
from orthorank.demo.run import Run
from orthorank.evaluation import perplexity
from orthorank.models import load_model
from tests.orthorank.demo.test_demo import Watcher, settings


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Any]:
    """A finished run with corrected rows: its folder, its results, and these as they were before speed was measured."""
    output, early = tmp_path_factory.mktemp("corrected"), []
    results = run_demo(settings(tiny_folder, output), on_quality=lambda found: early.append(copy.deepcopy(found)))
    return output, results, early


def rows_of(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in results["rows"]}


def test_the_plan_in_the_demos_folder(tmp_path: Path) -> None:
    maps = Correction({1: LayerMap(torch.ones(1, 8), torch.ones(8, 1), torch.ones(8))})
    plan = OrthoRankConfig(layers=[1], correction=maps)
    run: Any = SimpleNamespace(folder=tmp_path, results={})
    Run.save_plan(run, "orthorank-corrected", plan)
    assert OrthoRankConfig.from_pretrained(tmp_path / "corrected") == plan
    Run.forget_plans(run)
    assert list(tmp_path.iterdir()) == []


def test_maps_are_those_of_the_calibration_windows(finished: Any, tiny_folder: Path) -> None:
    output, results, _ = finished
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    samples = take_samples(tokenize(find_text(), tokenizer), windows=2, window=32, held_out_windows=3, held_out_len=48)
    rows = rows_of(results)
    for name, file, folder in (
        ("orthorank", "orthorank.json", "corrected"),
        ("layer-pruning", "orthorank-pruning.json", "corrected-pruning"),
    ):
        plain, kept = OrthoRankConfig.from_pretrained(output / file), OrthoRankConfig.from_pretrained(output / folder)
        assert plain.correction is None
        assert kept.correction == fit_correction(model, samples.calibration, plain, rank=4).correction
        assert kept.calibration["correction"]["texts"][0]["windows"] == 2
        row = rows[f"{name}-corrected"]
        with apply(model, kept):
            assert perplexity(model, samples.held_out).perplexity == pytest.approx(row["perplexity"], rel=1e-5)
        assert row["layers"] == plain.layers
        assert row["flop_speedup"] < rows[name]["flop_speedup"], "the maps are counted"
        assert kept.measured["perplexity"] == row["perplexity"]


def test_differences_are_paired_by_window(finished: Any) -> None:
    _, results, _ = finished
    losses = {
        name: torch.tensor(found, dtype=torch.float64) for name, found in results["quality"]["window_losses"].items()
    }
    assert len(losses["dense"]) == 3

    def expected(of: str, against: str) -> dict[str, Any]:
        apart = losses[of] - losses[against]
        error = apart.std().item() / 3**0.5
        return {"mean": pytest.approx(apart.mean().item()), "standard_error": pytest.approx(error)}

    pairs = {(pair["of"], pair["against"]): pair for pair in results["quality"]["differences"]}
    assert set(pairs) == {
        ("orthorank", "layer-pruning"),
        ("orthorank-corrected", "layer-pruning-corrected"),
        ("layer-pruning-corrected", "layer-pruning"),
        ("orthorank-corrected", "orthorank"),
    }
    for (of, against), pair in pairs.items():
        assert pair == {"of": of, "against": against} | expected(of, against)
    for row in results["rows"][1:]:
        assert row["above_dense"] == expected(row["name"], "dense")
    assert results["rows"][0]["above_dense"] is None


def test_quality_is_known_before_speed_is_measured(finished: Any) -> None:
    _, results, (early,) = finished
    assert all(row["perplexity"] and row["speedup"] is None for row in early["rows"])
    assert [row["perplexity"] for row in early["rows"]] == [row["perplexity"] for row in results["rows"]]
    assert early["quality"] == results["quality"]
    assert "speed" not in early


def test_a_given_corrected_plan_is_measured_with_its_own_maps(finished: Any, tiny_folder: Path, tmp_path: Path) -> None:
    output, _, _ = finished
    given = OrthoRankConfig.from_pretrained(output / "corrected")
    run_demo(settings(tiny_folder, tmp_path, plan=str(output / "corrected"), sparsity=None, rank=2))
    assert OrthoRankConfig.from_pretrained(tmp_path / "corrected").correction == given.correction
    assert OrthoRankConfig.from_pretrained(tmp_path).correction is None
    pruning = OrthoRankConfig.from_pretrained(tmp_path / "corrected-pruning")
    assert pruning.correction is not None
    assert pruning.correction.rank == 2, "fitted here"
    assert "maps of rank 4 that the plan came with" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_ctrl_c_does_not_lose_a_corrected_plan_that_is_measured_again(tiny_folder: Path, tmp_path: Path) -> None:
    run_demo(settings(tiny_folder, tmp_path, layers=[2, 3], sparsity=None))
    before = OrthoRankConfig.from_pretrained(tmp_path / "corrected")
    again = settings(tiny_folder, tmp_path, plan=str(tmp_path / "corrected"), sparsity=None, rank=0)
    with pytest.raises(OrthoRankError, match=r"^interrupted"):
        run_demo(again, Watcher("layer pruning (SLEB)", 1))
    assert OrthoRankConfig.from_pretrained(tmp_path / "corrected").correction == before.correction
    rows = rows_of(run_demo(again))
    assert "orthorank-corrected" in rows, "with the maps that it came with"
    assert "layer-pruning-corrected" not in rows


def test_a_layer_with_nothing_to_explain_costs_its_corrected_row_alone(tiny_folder: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    almost_dense = settings(tiny_folder, tmp_path, layers=[2, 3], sparsity=None, keep_ratio=31 / 32)  # all but the sink
    assert list(rows_of(run_demo(almost_dense, watcher))) == ["dense", "orthorank"]
    assert any(
        words.startswith("OrthoRank, corrected: left out, since a layer leaves no token") for words in watcher.said
    )


def test_rank_0_leaves_the_rows_out_and_an_earlier_runs_plans_go(tiny_folder: Path, tmp_path: Path) -> None:
    run_demo(settings(tiny_folder, tmp_path, layers=[2, 3], sparsity=None))
    assert (tmp_path / "corrected" / "correction.safetensors").is_file()
    results = run_demo(settings(tiny_folder, tmp_path, layers=[2, 3], sparsity=None, rank=0, windows=1))
    assert list(rows_of(results)) == ["dense", "layer-pruning", "orthorank"]
    assert not (tmp_path / "corrected").exists()


def test_ctrl_c_while_maps_are_fitted(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match=r"^interrupted; .*corrected/orthorank\.json"):
        run_demo(settings(tiny_folder, tmp_path), Watcher("layer pruning, corrected", 1))
    assert OrthoRankConfig.from_pretrained(tmp_path / "corrected").correction is not None
    assert not (tmp_path / "corrected-pruning").exists()
