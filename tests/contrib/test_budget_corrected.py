"""``python -m contrib.budget --correct``: every plan is judged with maps, whose FLOPs count."""

import dataclasses
import math
from pathlib import Path

import pytest
from transformers import LlamaConfig

from contrib.budget.__main__ import main
from contrib.budget.costs import count_flops
from contrib.budget.job import run_search
from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.evaluation import prefill_flops
from tests.contrib.test_budget_command import Stopper, settings

RANK = 6


def test_costs_count_maps() -> None:
    config = LlamaConfig()
    plain, corrected = (count_flops(config, 512, [0.5], rank) for rank in (0, 64))
    plan = {3: 0.5, 7: 0.0}
    ranks = dict.fromkeys(plan, 64)
    expected = prefill_flops(config, 512, plan, plan, ranks=ranks) - prefill_flops(config, 512, plan, plan)
    assert corrected.of(plan) - plain.of(plan) == expected
    assert corrected.dense == plain.dense


def test_a_mixed_corrected_plan(tiny_folder: Path, tmp_path: Path) -> None:
    results = run_search(settings(tiny_folder, tmp_path, correct=RANK, fit_windows=6))
    plan = OrthoRankConfig.from_pretrained(tmp_path)
    assert plan.correction is not None
    assert (plan.correction.rank, plan.correction.layers) == (RANK, plan.layers)
    assert plan.calibration["correction"]["windows"] == 10
    names = [row["name"] for row in results["rows"]]
    assert names == ["dense", "OrthoRank", "layer pruning", "mixed"]
    mixed = results["rows"][-1]
    assert mixed["cost"] <= 2 / 3
    assert all(row["cost"] < mixed["cost"] or row["loss"] >= mixed["loss"] for row in results["rows"][1:-1])
    assert all(math.isfinite(row["perplexity"]) for row in results["rows"])
    assert plan.measured["perplexity"] == mixed["perplexity"]


@pytest.mark.slow
def test_an_interrupted_one_goes_on(tiny_folder: Path, tmp_path: Path) -> None:
    whole = settings(tiny_folder, tmp_path / "whole", correct=RANK, fit_windows=6, starts=("none",))
    run_search(whole)
    part = dataclasses.replace(whole, output=tmp_path / "part", resume=True)
    with pytest.raises(OrthoRankError, match="--resume"):
        run_search(part, Stopper(4))
    run_search(part)
    first, second = (OrthoRankConfig.from_pretrained(tmp_path / name) for name in ("whole", "part"))
    assert first.ratios == second.ratios
    assert first.correction == second.correction


def test_maps_have_no_seconds(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(tiny_folder), "--budget", "0.8", "--budget-unit", "time", "--correct", "4"]
    assert main([*given, "--output", str(tmp_path / "out")]) == 2
    assert "what maps take is counted in FLOPs only" in " ".join(capsys.readouterr().err.split())
