"""Searches for a loss: the plan with the fewest FLOPs on the greedy path that is within, measured window by window."""

import contextlib
import dataclasses
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply, fit_correction, load_model
from orthorank.cli import main
from orthorank.common.files import read_json
from orthorank.common.texts import find_text, take_samples, tokenize
from orthorank.evaluation import perplexity, prefill_flops
from orthorank.search import SearchSettings, quality
from orthorank.search.calibration import _divided
from orthorank.search.job import NothingWithin
from orthorank.search.run import run_search
from tests.orthorank.search_runs import Watcher, plan_in, settings, short_text

RANK = 6
KINDS: dict[str, dict[str, Any]] = {
    "select": {},
    "remove": {"keep_ratio": 0.0},
    "corrected": {"keep_ratio": 0.0, "correct": RANK, "fit_windows": 6},
}


def of(folder: Path, output: Path, kind: str, **changes: Any) -> SearchSettings:
    """The whole path, 4 layers of the tiny model's, on four windows and four held-out ones."""
    return settings(folder, output, **KINDS[kind] | {"layers": 4, "windows": 4} | changes)


def stated(folder: Path, kind: str, order: list[int]) -> list[tuple[float, float, float]]:
    """Of each prefix of ``order``: FLOPs, mean rise and its standard error, fitted and applied by itself."""
    model, tokenizer, _ = load_model(str(folder), device="cpu")
    given = KINDS[kind]
    windows = 4 + given.get("fit_windows", 0)
    samples = take_samples(
        tokenize(find_text(short_text(folder)), tokenizer),
        windows=windows,
        window=32,
        held_out_windows=4,
        held_out_len=32,
    )
    judged, fit = _divided(samples.calibration, 4)
    dense, cost = perplexity(model, samples.held_out).window_losses, prefill_flops(model.config, 512)
    found = []
    for count in range(1, len(order) + 1):
        plan = OrthoRankConfig(layers=sorted(order[:count]), keep_ratio=given.get("keep_ratio", 1 / 3))
        if fit is not None:
            plan = fit_correction(model, torch.cat([fit, judged]), plan, rank=RANK, batch_size=1)
        with apply(model, plan):
            own = perplexity(model, samples.held_out).window_losses
        rises = [b - a for a, b in zip(dense, own, strict=True)]
        flops = prefill_flops(model.config, 512, plan.layers, plan.keep_ratio, ranks=plan.ranks) / cost
        found.append((flops, statistics.fmean(rises), statistics.stdev(rises) / math.sqrt(4)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_the_fewest_flops_within_the_loss(tiny_folder: Path, tmp_path: Path, kind: str) -> None:
    """Against the definition: every prefix measured, the cheapest of those within taken."""
    with pytest.raises(NothingWithin) as nothing:
        run_search(of(tiny_folder, tmp_path / "all", kind, max_loss=0.0))
    state = read_json(tmp_path / "all" / "search-state.json")
    order = state["chosen"]
    expected = stated(tiny_folder, kind, order)
    rows = sorted(nothing.value.prefixes, key=lambda row: len(row["layers"]))
    assert [row["layers"] for row in rows] == [order[:count] for count in range(1, 5)]
    for row, (flops, mean, error) in zip(rows, expected, strict=True):
        assert [row["mean"], row["standard_error"]] == pytest.approx([mean, error], abs=2e-5)
        assert row["flops"] == pytest.approx(flops, abs=1e-5)
        assert row["most"] == pytest.approx(mean + 2 * error, abs=6e-5)
    for limit in sorted(row["most"] for row in rows):
        folder = tmp_path / f"{limit:.4f}"
        results = run_search(of(tiny_folder, folder, kind, max_loss=limit + 1e-6))
        best = min((row for row in rows if row["most"] <= limit + 1e-6), key=lambda row: row["flops"])
        plan = OrthoRankConfig.from_pretrained(folder)
        assert plan.layers == sorted(best["layers"])
        assert plan.calibration["order"] == best["layers"]
        assert plan.calibration["losses"] == state["losses"][: len(best["layers"])]
        assert (plan.calibration["complete"], plan.calibration["max_loss"]) == (True, limit + 1e-6)
        assert plan.measured["rise"] == {name: best[name] for name in ("mean", "standard_error", "n")}
        assert (plan.correction is not None) == (kind == "corrected")
        assert results["prefixes"] == read_json(folder / "search.json")["results"]["prefixes"]
        assert results["prefixes"][-1] == best, "cheaper ones are measured before, dearer ones are not"


def test_without_a_number_of_layers_the_path_ends_behind_twice_the_loss(tiny_folder: Path, tmp_path: Path) -> None:
    whole = of(tiny_folder, tmp_path / "whole", "corrected", max_loss=99.0)
    run_search(whole)
    record = plan_in(tmp_path / "whole")["calibration"]
    rises = [loss - record["dense_loss"] for loss in record["losses"]]
    assert max(rises[:2]) < 0 < rises[2] < rises[3]
    for limit, count in ((0.0, 3), (rises[2] / 2 - 1e-4, 3), (rises[2] / 2 + 1e-4, 4)):
        folder = tmp_path / f"{limit}"
        with contextlib.suppress(NothingWithin):
            run_search(dataclasses.replace(whole, output=folder, layers=None, max_loss=limit))
        state = read_json(folder / "search-state.json")
        assert (state["rounds"], state["chosen"]) == (4, record["order"][:count])


@pytest.mark.parametrize("kind", ["remove", "corrected"])
def test_nothing_is_measured_twice(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Ctrl-C between two plans, then another loss with the same search: rows that are there are taken."""
    real, measured = quality.perplexity, []

    def counted(model: Any, ids: torch.Tensor) -> Any:
        measured.append(len(ids))
        return real(model, ids)

    monkeypatch.setattr(quality, "perplexity", counted)
    whole = of(tiny_folder, tmp_path / "whole", kind, max_loss=0.0)
    with pytest.raises(NothingWithin) as nothing:
        run_search(whole)
    assert measured == [4] * 5, "the dense model and four plans"
    part = dataclasses.replace(whole, output=tmp_path / "part", resume=True)
    with pytest.raises(OrthoRankError, match=r"interrupted after 3 measured plans.*the same command and --resume"):
        run_search(part, Watcher("plans on held-out windows", 3))
    assert measured == [4] * 8
    watcher = Watcher()
    with pytest.raises(NothingWithin) as again:
        run_search(part, watcher)
    assert measured == [4] * 10
    assert again.value.prefixes == nothing.value.prefixes
    assert not (tmp_path / "part" / "orthorank.json").exists()
    record = read_json(tmp_path / "part" / "search.json")["results"]
    assert (record["plan"], record["prefixes"]) == (None, nothing.value.prefixes)
    enough = max(row["most"] for row in nothing.value.prefixes)
    results = run_search(dataclasses.replace(part, max_loss=enough))
    assert measured == [4] * 10, "another loss needs no other measurement"
    assert results["prefixes"] == nothing.value.prefixes
    assert (tmp_path / "part" / "orthorank.json").exists()
    with pytest.raises(NothingWithin):
        run_search(part)
    assert not [file.name for file in (tmp_path / "part").iterdir() if not file.name.startswith("search")], "no plan"
    assert len(results["plan"]["layers"]) == next(
        len(row["layers"]) for row in results["prefixes"] if row["most"] <= enough
    )


def test_the_command(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--text", str(short_text(tiny_folder)), "--window", "32", "--windows", "4", "--device", "cpu"]
    line = ["search", str(tiny_folder), *small, "--no-sink-floor", "--output", str(tmp_path / "out"), "--max-loss"]
    assert main([*line, "1e-3"]) == 2
    assert main([*line, "0.0001"]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "No plan of this search is within max_loss 0.0001: the smallest rise is " in said
    rows = json.loads((tmp_path / "out" / "search.json").read_text())["results"]["prefixes"]
    least = min(rows, key=lambda row: row["most"])
    assert f"{least['mean']:.4f} ± {least['standard_error']:.4f} nats a token, {least['most']:.4f} with two" in said
    assert main([*line, "9", "--resume"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"{least['mean']:+.4f} ± {least['standard_error']:.4f}" in said
    assert "Plan: " in said
    assert plan_in(tmp_path / "out")["measured"]["rise"]["n"] == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_loss": -0.1}, "max_loss is -0.1; it must be 0 or more"),
        ({"max_loss": math.nan}, "max_loss is nan"),
        ({"max_loss": True}, "max_loss is True"),
        ({"max_loss": 0.1, "method": "influence"}, "max_loss is for the method greedy"),
        ({"max_loss": 0.1, "windows": 1}, "max_loss is judged on held-out windows, 2 or more, and here are 1"),
    ],
)
def test_what_is_refused(tiny_folder: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        run_search(settings(tiny_folder, tmp_path / "out", **changes))
