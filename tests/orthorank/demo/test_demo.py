"""The main job on a tiny saved model, read back from its files; and, slowly, on SmolLM2."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.demo import Settings, SilentScreen, run_demo
from orthorank.models import load_model
from orthorank.plans import FOLDER, default_plan, file_of, shipped_plans
from orthorank.search import SearchState
from tests.orthorank.report.test_report import usage

ROW = {
    "name",
    "layers",
    "keep_ratio",
    "nominal_sparsity",
    "perplexity",
    "tokens_per_second",
    "speedup",
    "flop_speedup",
}
ALL = {"results.json", "report.html", "orthorank.json", "orthorank-pruning.json", "corrected", "corrected-pruning"}


def settings(folder: Path, output: Path, **changes: Any) -> Settings:
    quick: dict[str, Any] = {
        "model": str(folder),
        "output": output,
        "device": "cpu",
        "sink_layer": 0,  # the tiny model has no sink to detect
        "sparsity": 0.34,  # of 6 layers: 3 selected, 2 removed
        "windows": 2,
        "window": 32,
        "rank": 4,
        "held_out_windows": 3,
        "held_out_len": 48,
        "prompt_tokens": 64,
        "rounds": 2,
    }
    return Settings(**(quick | changes))


class Watcher(SilentScreen):
    """Counts progress, and presses Ctrl-C after ``stop`` parts of the work called ``title``."""

    def __init__(self, title: str = "", stop: int = 0) -> None:
        self.title, self.stop = title, stop
        self.seen: dict[str, list[tuple[int, str]]] = {}
        self.said: list[str] = []

    def say(self, words: str) -> None:
        self.said.append(words)

    def progress(self, title: str, total: int) -> Any:
        from contextlib import nullcontext

        def advance(done: int, note: str) -> None:
            self.seen.setdefault(title, []).append((done, note))
            assert done <= total
            if title == self.title and done == self.stop:
                raise KeyboardInterrupt

        return nullcontext(advance)


@pytest.fixture(scope="module")
def finished(tiny_folder, tmp_path_factory):
    """A finished run: its folder, what the watcher saw, what `run_demo` returned."""
    output, watcher = tmp_path_factory.mktemp("demo"), Watcher()
    results = run_demo(settings(tiny_folder, output), watcher)
    return output, watcher, results


def test_the_results_have_the_promised_form(finished):
    output, _, returned = finished
    results = json.loads((output / "results.json").read_text())
    assert results["complete"] is True
    assert isinstance(results["model"], str)
    assert isinstance(results["text"], str)
    assert [row["name"] for row in results["rows"]] == [
        "dense", "layer-pruning", "orthorank", "layer-pruning-corrected", "orthorank-corrected"
    ]  # fmt: skip
    for row in results["rows"]:
        assert set(row) >= ROW
        assert all(
            math.isfinite(row[key]) and row[key] > 0 for key in ROW - {"name", "layers", "nominal_sparsity"}
        ) or (row["name"].startswith("layer-pruning") and row["keep_ratio"] == 0)
    assert results["rows"] == json.loads(json.dumps(returned["rows"]))
    dense, pruned, ortho = results["rows"][:3]
    assert (dense["layers"], dense["keep_ratio"], dense["nominal_sparsity"], dense["speedup"]) == ([], 1.0, 0.0, 1.0)
    assert (len(pruned["layers"]), pruned["keep_ratio"]) == (2, 0.0)
    assert (len(ortho["layers"]), ortho["keep_ratio"]) == (3, pytest.approx(1 / 3))
    assert pruned["nominal_sparsity"] == pytest.approx(1 / 3)
    assert ortho["nominal_sparsity"] == pytest.approx(1 / 3)
    assert set(ortho["layers"]) <= {1, 2, 3}, "after the sink, without the last two"
    assert set(pruned["layers"]) <= {1, 2, 3, 4}, "not the first or the last layer"


def test_the_figures_are_those_of_the_plans_in_the_folder(finished, tiny_folder):
    from orthorank.common.texts import find_text, take_samples, tokenize
    from orthorank.evaluation import flop_speedup, perplexity

    output, _, results = finished
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    samples = take_samples(tokenize(find_text(), tokenizer), windows=2, window=32, held_out_windows=3, held_out_len=48)
    files = {"layer-pruning": "orthorank-pruning.json", "orthorank": "orthorank.json"}
    rows = {row["name"]: row for row in results["rows"]}
    assert perplexity(model, samples.held_out).perplexity == pytest.approx(rows["dense"]["perplexity"], rel=1e-5)
    for name, file in files.items():
        plan = OrthoRankConfig.from_pretrained(output / file)
        assert plan.layers == rows[name]["layers"]
        assert (plan.num_hidden_layers, plan.hidden_size, plan.model_type) == (6, 64, "llama")
        assert plan.calibration["text_sha256"] == results["text_info"]["sha256"]
        assert plan.calibration["tokens"] == 64
        assert plan.measured["perplexity"] == rows[name]["perplexity"]
        assert rows[name]["flop_speedup"] == pytest.approx(flop_speedup(model.config, 64, plan.layers, plan.keep_ratio))
        with apply(model, plan):
            mine = perplexity(model, samples.held_out).perplexity
        assert mine == pytest.approx(rows[name]["perplexity"], rel=1e-5)


def test_the_watcher_sees_every_evaluation_and_the_running_best(finished):
    _, watcher, results = finished
    done = [part for part, _ in watcher.seen["OrthoRank"]]
    assert done == list(range(1, 3 + 2 + 1 + 1))
    losses = [float(note.rpartition(" ")[2]) for _, note in watcher.seen["OrthoRank"]]
    assert losses[:3] == sorted(losses[:3], reverse=True), "the best of a round never rises"
    assert results["plans"]["orthorank"]["losses"][-1] == pytest.approx(losses[-1], abs=1e-3)


def test_the_search_minimised_what_it_says(finished, tiny_folder):
    """The losses are those of the real patched model on the calibration windows; the first round took the best."""
    from orthorank.common.texts import find_text, take_samples, tokenize
    from orthorank.evaluation import perplexity

    _, _, results = finished
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    ids = take_samples(
        tokenize(find_text(), tokenizer), windows=2, window=32, held_out_windows=1, held_out_len=48
    ).calibration

    def loss(layers: list[int]) -> float:
        with apply(model, OrthoRankConfig(layers=layers, keep_ratio=1 / 3)):
            return perplexity(model, ids).loss

    found = results["plans"]["orthorank"]
    assert found["losses"][-1] == pytest.approx(loss(found["layers"]), abs=1e-5)
    assert found["losses"][0] == pytest.approx(min(loss([layer]) for layer in (1, 2, 3)), abs=1e-5)


def test_the_page_is_there_and_names_the_layers(finished):
    output, _, _ = finished
    html = (output / "report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert "layers 1-3" in html
    assert sorted(file.name for file in output.iterdir()) == [
        "corrected",
        "corrected-pruning",
        "orthorank-pruning.json",
        "orthorank.json",
        "report.html",
        "results.json",
    ], "no part files are left"


def test_the_usage_on_the_page_runs(finished, capsys):
    output, _, results = finished
    names: dict[str, Any] = {}
    exec(usage((output / "report.html").read_text()), names)
    out = capsys.readouterr().out
    assert "The attention sink is" in out
    assert "selected" in out, "the status of the plan"
    assert names["handle"].stats[results["rows"][2]["layers"][0]].tokens_updated > 0


def test_a_found_plan_can_be_measured_again(finished, tiny_folder, tmp_path):
    output, _, before = finished
    again = settings(tiny_folder, tmp_path, plan=str(output), sparsity=None, sink_layer=None)
    watcher = Watcher()
    results = run_demo(again, watcher)
    assert [row["layers"] for row in results["rows"]] == [row["layers"] for row in before["rows"]]
    assert [row["perplexity"] for row in results["rows"]] == [
        pytest.approx(row["perplexity"], rel=1e-5) for row in before["rows"]
    ]
    assert "OrthoRank" not in watcher.seen, "nothing is searched"


def test_given_layers_are_taken_and_layer_pruning_is_searched_at_their_sparsity(tiny_folder, tmp_path):
    results = run_demo(settings(tiny_folder, tmp_path, layers=[2, 3, 4], sparsity=None, keep_ratio=0.5))
    _, pruned, ortho = results["rows"][:3]
    assert (ortho["layers"], ortho["keep_ratio"], ortho["nominal_sparsity"]) == ([2, 3, 4], 0.5, 0.25)
    assert len(pruned["layers"]) == 1


def test_a_sparsity_below_one_layer_has_no_row_of_layer_pruning(tiny_folder, tmp_path):
    watcher = Watcher()
    results = run_demo(settings(tiny_folder, tmp_path, layers=[3], sparsity=None), watcher)
    assert [row["name"] for row in results["rows"]] == ["dense", "orthorank", "orthorank-corrected"]
    assert any("less than one" in words for words in watcher.said)


@pytest.mark.parametrize(
    ("title", "stop", "plan_layers", "files"),
    [
        ("OrthoRank", 2, None, {"results.json", "report.html"}),  # in the first round
        ("OrthoRank", 4, 1, {"results.json", "report.html", "orthorank.json"}),  # in the second round
        ("layer pruning (SLEB)", 1, 3, {"results.json", "report.html", "orthorank.json"}),
        ("OrthoRank, corrected", 1, 3, {"results.json", "report.html", "orthorank.json", "orthorank-pruning.json"}),
        ("perplexity", 5, 3, ALL),
        ("prefill speed", 1, 3, ALL),
    ],
)
def test_ctrl_c_leaves_what_was_found(tiny_folder, tmp_path, title, stop, plan_layers, files):
    with pytest.raises(OrthoRankError, match=r"^interrupted; what was found until then is in ") as error:
        run_demo(settings(tiny_folder, tmp_path), Watcher(title, stop))
    assert {file.name for file in tmp_path.iterdir()} == files
    assert all(name in str(error.value) for name in files)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False
    assert "ended early" in (tmp_path / "report.html").read_text()
    if plan_layers is not None:
        plan = OrthoRankConfig.from_pretrained(tmp_path)
        assert len(plan.layers) == plan_layers
        apply(load_model(str(tiny_folder), device="cpu")[0], plan)
    if title == "perplexity":
        dense, pruned, ortho = results["rows"][:3]
        assert dense["perplexity"] > 0
        assert pruned["perplexity"] is None
        assert ortho["perplexity"] is None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"sink_layer": None}, "no sink: .* --sink-layer"),
        ({"sink_layer": 6}, "sink_layer is 6; the model has layers 0 to 5"),
        ({"layers": [2, 6], "sparsity": None}, "layers holds 6; the model has layers 0 to 5"),
        ({"sparsity": 0.05}, r"sparsity is 0.05, which is less than one layer of 6 .* smallest is 0.111"),
        (
            {"sparsity": 0.5},
            r"needs 4 layers .* only 3 may be chosen \(layers 1-3\); the largest sparsity here is 0.333",
        ),
        ({"plan": "default", "sparsity": None}, "no plan is shipped for this model .* HuggingFaceTB/SmolLM2-135M-Inst"),
        ({"windows": 10_000}, r"the text \(pydoc_data.* is too short: it has [\d,]+ tokens and 640,000 are needed"),
    ],
)
def test_what_cannot_be_done_is_said_and_leaves_an_earlier_result_alone(tiny_folder, tmp_path, changes, sentence):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(OrthoRankError, match=sentence):
        run_demo(settings(tiny_folder, tmp_path, **changes))
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]
    assert (tmp_path / "results.json").read_text() == "{}"


def test_a_plan_of_another_model_is_refused(finished, tiny_folder, tmp_path):
    plan = OrthoRankConfig.from_pretrained(finished[0])
    plan.num_hidden_layers = 30
    plan.save_pretrained(tmp_path / "plan")
    with pytest.raises(OrthoRankError, match="num_hidden_layers 30"):
        run_demo(settings(tiny_folder, tmp_path / "out", plan=str(tmp_path / "plan"), sparsity=None))


@pytest.mark.parametrize(
    ("sparsity", "method", "count", "ratio"),
    [
        (0.1, "orthorank", 4, 1 / 3),
        (0.1, "layer-pruning", 3, 0.0),
        (0.2, "orthorank", 9, 1 / 3),
        (0.2, "layer-pruning", 6, 0.0),
    ],
)
def test_the_shipped_plans_fit_smollm2(smollm2, sparsity, method, count, ratio):
    from orthorank.hf.apply import check_plan

    plan = default_plan(smollm2[0], method, sparsity)
    check_plan(smollm2[0], plan)
    assert plan in shipped_plans(method)
    assert (len(plan.layers), plan.keep_ratio) == (count, pytest.approx(ratio))
    assert plan.nominal_sparsity() == pytest.approx(count * (1 - ratio) / 30)
    assert plan.model_id == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert len(plan.calibration["text_sha256"]) == 64
    assert plan.calibration["tokens"] == 3 * 1024
    assert plan.measured["perplexity"] > plan.measured["dense_perplexity"]
    if method == "orthorank":
        assert set(plan.layers) <= set(range(12, 28))
        assert plan.sink_layer == 11


def test_the_shipped_plans_of_10_percent_are_what_a_recorded_search_on_the_same_tokens_found():
    records = Path(__file__).parents[3] / "benchmarks" / "results" / "plans"
    hashes, fingerprints = set(), set()
    for method in ("orthorank", "layer-pruning"):
        plan = OrthoRankConfig.from_pretrained(FOLDER / file_of("smollm2-135m-instruct", method, 0.1))
        state = SearchState.load(records / file_of("smollm2-135m-instruct", method, 0.1))
        assert state.complete
        assert (state.plan, state.losses[-1]) == (plan.layers, plan.calibration["loss"])
        hashes.add(plan.calibration["ids_sha256"])
        fingerprints.add(state.fingerprint)
    assert len(hashes) == 1
    assert len(fingerprints) == 2, "keep ratios differ"


def test_a_shipped_plan_is_for_one_model(tiny_model):
    model = tiny_model("llama", num_hidden_layers=30, hidden_size=576)
    assert default_plan(model).num_hidden_layers == 30, "a model without a hub id is matched by its shape"
    model.config._name_or_path = "someone/else"
    with pytest.raises(OrthoRankError, match="no plan is shipped for someone/else"):
        default_plan(model)
    with pytest.raises(OrthoRankError, match="no plan is shipped for this model"):
        default_plan(tiny_model("llama"))


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Plans for the tiny model's shape, as if they came with the package: 3 layers at 1/3, and 2 removed."""
    fields = {"num_hidden_layers": 6, "hidden_size": 64, "model_type": "llama"}
    fields["calibration"] = {"tokens": 64, "text": "a text"}
    for layers, ratio, file in (([1, 3, 4], 1 / 3, "tiny-34.json"), ([2, 5], 0.0, "tiny-34-pruning.json")):
        OrthoRankConfig(layers=layers, keep_ratio=ratio, **fields).save_pretrained(tmp_path)
        (tmp_path / "shipped").mkdir(exist_ok=True)
        (tmp_path / "orthorank.json").rename(tmp_path / "shipped" / file)
    monkeypatch.setattr("orthorank.plans.FOLDER", tmp_path / "shipped")


@pytest.mark.parametrize("plan", ["auto", "default"])
@pytest.mark.usefixtures("shipped")
def test_shipped_plans_are_taken_of_both_methods(tiny_folder, tmp_path, plan):
    watcher = Watcher()
    results = run_demo(settings(tiny_folder, tmp_path / "out", sink_layer=None, plan=plan), watcher)
    rows = {row["name"]: row["layers"] for row in results["rows"]}
    assert (rows["orthorank"], rows["layer-pruning"]) == ([1, 3, 4], [2, 5])
    origins = {found["origin"] for found in results["plans"].values()}
    assert origins == {"shipped with the package, found on 64 tokens of a text"}
    assert {"OrthoRank", "layer pruning (SLEB)"} & set(watcher.seen) == set(), "nothing is searched"


@pytest.mark.parametrize("asked", [{"plan": "search", "sink_layer": 0}, {"keep_ratio": 1 / 3, "sink_layer": 0}])
@pytest.mark.usefixtures("shipped")
def test_what_asks_for_a_search_gets_one(tiny_folder, tmp_path, asked):
    results = run_demo(settings(tiny_folder, tmp_path / "out", rank=0, **asked))
    assert {found["origin"] for found in results["plans"].values()} == {"greedy search"}
    assert {found["tokens"] for found in results["plans"].values()} == {64}, "the same for both"


def test_a_model_without_shipped_plans_is_searched_and_it_says_so(tiny_folder, tmp_path):
    watcher = Watcher()
    with pytest.raises(OrthoRankError, match="no sink"):  # what a search needs; this model has none
        run_demo(settings(tiny_folder, tmp_path, sink_layer=None), watcher)
    assert any("No plans are shipped for this model" in words for words in watcher.said)
    assert any("Python's own documentation" in words and "--text FILE" in words for words in watcher.said)


def test_the_model_is_left_dense(tiny_folder, tmp_path, monkeypatch):
    kept: list[Any] = []

    def load(*arguments: Any) -> Any:
        kept.append(load_model(str(tiny_folder), device="cpu"))
        return kept[-1]

    monkeypatch.setattr("orthorank.demo.job.load_model", load)
    ids = torch.arange(40)[None]
    run_demo(settings(tiny_folder, tmp_path))
    fresh = load_model(str(tiny_folder), device="cpu")[0]
    assert torch.equal(kept[0][0](ids).logits, fresh(ids).logits)


@pytest.mark.slow
def test_sigint_in_a_real_process(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    command = [sys.executable, "-m", "orthorank", "demo", "--model", str(folder), "--output", str(tmp_path / "out")]
    options = ["--sink-layer", "0", "--sparsity", "0.34", "--window", "512", "--windows", "200"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
    begin = time.monotonic()
    while not (tmp_path / "out" / "results.json").is_file() and time.monotonic() - begin < 120:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("orthorank: interrupted; what was found until then is in ")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["complete"] is False


@pytest.mark.slow
def test_the_whole_demo_on_smollm2(tmp_path):
    results = run_demo(Settings(output=tmp_path, device="cpu"))
    dense, pruned, ortho, pruned_corrected, ortho_corrected = results["rows"]
    assert (len(ortho["layers"]), len(pruned["layers"])) == (4, 3)
    assert ortho["nominal_sparsity"] == pytest.approx(4 * (2 / 3) / 30)
    assert pruned["nominal_sparsity"] == pytest.approx(0.1)
    assert results["sink"]["sink_layer"] == 11
    assert dense["perplexity"] < min(ortho["perplexity"], pruned["perplexity"]) < 2 * dense["perplexity"]
    assert ortho_corrected["perplexity"] < ortho["perplexity"]
    assert pruned_corrected["perplexity"] < pruned["perplexity"]
    assert 1.07 < ortho_corrected["flop_speedup"] < ortho["flop_speedup"] < 1.12
