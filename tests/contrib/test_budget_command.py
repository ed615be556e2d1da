"""``python -m contrib.budget`` on a tiny saved model: its files, its guarantee, applied plans, going on, refusals."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from contrib.budget.__main__ import main
from contrib.budget.budget import best_plan, budget_search
from contrib.budget.costs import CostTable
from contrib.budget.job import run_search
from contrib.budget.plan_loss import CalibrationLoss
from contrib.budget.plans import Space
from contrib.budget.settings import BudgetSettings
from contrib.budget.state import BudgetState
from orthorank import OrthoRankConfig, OrthoRankError, apply, cli
from orthorank.evaluation import perplexity, prefill_flops
from orthorank.search import Evaluator
from orthorank.stack.layers import LayerStack
from tests.orthorank.models import plain
from tests.orthorank.plain_search import LAYERS, random_windows, small_stack
from tests.orthorank.search.test_search_command import Watcher
from tests.orthorank.search.test_search_processes import Rank, on_every_rank

ROOT = Path(__file__).parents[2]
FILES = {"orthorank.json", "pareto.json", "pareto.csv", "pareto.png", "pareto.svg", "search.json", "search-state.json"}


def settings(folder: Path, output: Path, **changes: Any) -> BudgetSettings:
    quick: dict[str, Any] = {
        "model": str(folder),
        "output": output,
        "device": "cpu",
        "sink_floor": False,  # the tiny model has no sink
        "budget": 2 / 3,
        "windows": 4,
        "window": 32,
        "batch_size": 1,
        "exchanges": 6,
        "prompt_tokens": 64,
    }
    return BudgetSettings(**(quick | changes))


class Stopper(Watcher):
    """Presses Ctrl-C at the answer number ``after`` of the mixed search."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after, self.seen = after, 0

    def progress(self, title: str, total: int) -> Any:
        def advance(done: int, note: str) -> None:
            self.seen += title == "mixed plans"
            if self.seen == self.after:
                self.seen += 1  # once
                raise KeyboardInterrupt

        return nullcontext(advance)


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], Watcher]:
    """One search, as it comes: both plans of one form searched first."""
    output, watcher = tmp_path_factory.mktemp("budget") / "out", Watcher()
    return output, run_search(settings(tiny_folder, output), watcher), watcher


def test_files(run: tuple[Path, dict[str, Any], Watcher]) -> None:
    output, results, watcher = run
    assert {file.name for file in output.iterdir()} == FILES | {"starts"}
    assert {file.name for file in (output / "starts").iterdir()} == {"orthorank", "layer-pruning"}
    assert (output / "pareto.png").read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in (output / "pareto.svg").read_text()
    assert [row["name"] for row in results["rows"]] == ["dense", "OrthoRank", "layer pruning", "mixed"]
    plan = OrthoRankConfig.from_pretrained(output)
    assert plan.to_dict() == results["plan"]
    assert plan.calibration["complete"]
    assert plan.calibration["cost"] <= 2 / 3 + 1e-8
    assert any("exchanges" in words for words in watcher.said)
    percents = [done for done, note in watcher.notes if "of about" in note]
    assert percents == sorted(percents)
    assert percents[-1] <= 100


def test_no_worse_than_the_plans_of_one_form(run: tuple[Path, dict[str, Any], Watcher]) -> None:
    """By what the files say: for each start the front has a plan that costs no more and loses no more."""
    output, results, _ = run
    front = json.loads((output / "pareto.json").read_text())["front"]
    starts = [row for row in results["rows"] if row["name"] in ("OrthoRank", "layer pruning")]
    assert len(starts) == 2
    for row in starts:
        assert any(p["share"] <= row["cost"] and p["loss"] <= row["loss"] for p in front), row["name"]
    within = [row["loss"] for row in starts if row["cost"] <= 2 / 3 + 1e-8]
    assert results["rows"][-1]["loss"] <= min(within)


def test_costs_are_those_of_the_flop_count(run: tuple[Path, dict[str, Any], Watcher], tiny_folder: Path) -> None:
    from transformers import AutoConfig

    _, results, _ = run
    config = AutoConfig.from_pretrained(tiny_folder)
    head = 2 * config.hidden_size * config.vocab_size
    dense = prefill_flops(config, 64) - head
    for row in results["rows"]:
        ratios = {int(layer): ratio for layer, ratio in row["keep_ratios"].items()}
        flops = prefill_flops(config, 64, ratios, ratios or 1.0) - head
        assert row["cost"] == pytest.approx(flops / dense, rel=1e-12), row["name"]


def test_the_applied_plan_has_the_loss_of_the_search(
    run: tuple[Path, dict[str, Any], Watcher], tiny_folder: Path
) -> None:
    """The same windows through the patched model: perplexity is the exponential of the calibration loss."""
    from orthorank.models import load_model
    from orthorank.search.calibration import cut_windows, find_source

    output, results, _ = run
    model, tokenizer, info = load_model(str(tiny_folder), "cpu")
    asked = settings(tiny_folder, output)
    windows = cut_windows(asked, find_source(asked), model, tokenizer, info.max_tokens)
    plan = OrthoRankConfig.from_pretrained(output)
    assert plan.layers
    with apply(model, plan):
        found = perplexity(model, windows.windows).perplexity
        held_out = perplexity(model, windows.held_out).perplexity
    assert found == pytest.approx(math.exp(results["rows"][-1]["loss"]), rel=1e-5)
    assert held_out == pytest.approx(results["rows"][-1]["perplexity"], rel=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_mixed_plans_applied_and_evaluated(family: str) -> None:
    """Dense, selecting at two ratios and removed layers in one plan."""
    model = plain(family)
    ids = torch.randint(3, 128, (3, 40), generator=torch.Generator().manual_seed(2))
    plan = {0: 0.5, 1: 0.0, 3: 0.25}
    loss = CalibrationLoss(Evaluator(LayerStack(model), ids, batch_size=1)).loss(plan)
    config = OrthoRankConfig.for_model(model, layers=list(plan), keep_ratio=0.5, keep_ratios={1: 0.0, 3: 0.25})
    with apply(model, config):
        assert perplexity(model, ids).perplexity == pytest.approx(math.exp(loss), rel=1e-5)


def test_scouting_sees_some_windows() -> None:
    model = plain("llama")
    ids = torch.randint(3, 128, (8, 24), generator=torch.Generator().manual_seed(2))
    losses = CalibrationLoss(Evaluator(LayerStack(model), ids, batch_size=1))
    first = CalibrationLoss(Evaluator(LayerStack(model), ids[:2], batch_size=1))
    assert losses.scout_windows == 2
    assert losses.scout({2: 0.0}) == first.loss({2: 0.0})
    exact = losses.loss({2: 0.0})
    assert losses.loss({2: 0.0}, exact) == exact
    assert losses.loss({2: 0.0}, math.nextafter(exact, 0)) in (exact, math.inf)
    together = CalibrationLoss(Evaluator(LayerStack(model), ids, batch_size=3))
    assert together.scout_windows == 3
    assert together.fingerprint != losses.fingerprint


def test_csv(run: tuple[Path, dict[str, Any], Watcher]) -> None:
    output, _, _ = run
    rows = list(csv.DictReader((output / "pareto.csv").open()))
    whole = json.loads((output / "pareto.json").read_text())
    assert len(rows) == len(whole["points"])
    assert [float(row["loss"]) for row in rows] == [point["loss"] for point in whole["points"]]
    assert sum(row["on_front"] == "1" for row in rows) == len(whole["front"])
    for row, point in zip(rows, whole["points"], strict=True):
        pairs = dict(pair.split(":") for pair in row["plan"].split())
        assert {layer: pytest.approx(float(r), rel=1e-5) for layer, r in pairs.items()} == point["plan"]


def test_given_plan_files_and_measured_time(
    run: tuple[Path, dict[str, Any], Watcher], tiny_folder: Path, tmp_path: Path
) -> None:
    """From a plan file, with times of this machine as costs; a continued search keeps the times it has."""
    output, first, _ = run
    given = str(output / "starts" / "layer-pruning" / "orthorank.json")
    options: dict[str, Any] = {"starts": (given,), "budget_unit": "time", "keep_ratios": (0.0, 0.5), "exchanges": 2}
    with pytest.raises(OrthoRankError, match=r"interrupted after \d+ evaluations .* --resume"):
        run_search(settings(tiny_folder, tmp_path / "time", **options), Stopper(12))
    state = BudgetState.load(tmp_path / "time" / "search-state.json")
    resumed = run_search(settings(tiny_folder, tmp_path / "time", **options, resume=True), Watcher())
    assert BudgetState.load(tmp_path / "time" / "search-state.json").settings == state.settings
    assert state.settings["costs"]["unit"] == "time"
    assert [row["name"] for row in resumed["rows"]] == ["dense", given, "mixed"]
    assert resumed["rows"][1]["loss"] == next(r for r in first["rows"] if r["name"] == "layer pruning")["loss"]
    assert resumed["rows"][-1]["cost"] <= 2 / 3 + 1e-8
    assert resumed["plan"]["calibration"]["cost_unit"] == "time"


@pytest.mark.parametrize("stop", [9, 40])
def test_interrupted_and_resumed(
    run: tuple[Path, dict[str, Any], Watcher], tiny_folder: Path, tmp_path: Path, stop: int
) -> None:
    """The same plan and the same front, to the last bit."""
    output, whole, _ = run
    with pytest.raises(OrthoRankError, match=r"interrupted"):
        run_search(settings(tiny_folder, tmp_path), Stopper(stop))
    assert not json.loads((tmp_path / "pareto.json").read_text())["complete"]
    resumed = run_search(settings(tiny_folder, tmp_path, resume=True), Watcher())
    same = ("rows", "plan", "evaluations")
    assert {name: resumed[name] for name in same} == {name: whole[name] for name in same}
    for name in ("pareto.json", "pareto.csv", "pareto.svg"):
        assert (tmp_path / name).read_text() == (output / name).read_text(), name


def test_killed_and_resumed(run: tuple[Path, dict[str, Any], Watcher], tiny_folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the mixed plans."""
    output, whole, _ = run
    words = [
        sys.executable,
        "-m",
        "contrib.budget",
        str(tiny_folder),
        "--output",
        str(tmp_path),
        "--budget",
        "2/3",
    ]
    words += ["--no-sink-floor", "--windows", "4", "--window", "32", "--batch-size", "1", "--device", "cpu"]
    words += ["--exchanges", "6", "--prompt-tokens", "64"]
    child = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    state, deadline = tmp_path / "search-state.json", time.monotonic() + 120
    while not state.exists() or len(BudgetState.load(state).seen) < 8:
        assert child.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    before = BudgetState.load(state)
    assert not (tmp_path / "pareto.json").exists()
    resumed = run_search(settings(tiny_folder, tmp_path, resume=True), Watcher())
    after = BudgetState.load(state)
    assert list(after.seen)[: len(before.seen)] == list(before.seen), "it took the same way"
    assert all(after.seen[key].loss == seen.loss for key, seen in before.seen.items() if seen.loss is not None)
    assert [row["loss"] for row in resumed["rows"]] == [row["loss"] for row in whole["rows"]]
    assert (tmp_path / "pareto.csv").read_text() == (output / "pareto.csv").read_text()


def test_from_the_command_line(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(tiny_folder), "--budget", "3/4", "--keep-ratios", "0,1/2", "--start", "none"]
    words += ["--output", str(tmp_path / "out"), "--no-sink-floor", "--windows", "2", "--window", "32"]
    words += ["--device", "cpu", "--exchanges", "0", "--batch-size", "1"]
    assert main(words) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "mixed plans at 0.75 of the dense layers' FLOPs" in shown
    assert "cost" in shown
    assert not (tmp_path / "out" / "starts").exists()
    assert main(words) == 2
    assert "earlier result" in capsys.readouterr().err
    assert main([*words, "--resume", "--exchanges", "1"]) == 2
    assert "its exchanges is 0 and now it is 1" in capsys.readouterr().err


def test_the_command_of_the_package_names_the_new_place(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--budget", "0.8"], ["--exchanges", "4"], ["--start", "none", "--keep-ratios", "0,1/2"]):
        assert cli.main(["search", *words]) == 2
        assert "in a checkout, run: python -m contrib.budget" in capsys.readouterr().err


def test_what_the_command_is_called_with_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--budget", "0.8", "--exchanges", "9" * 12]) == 2
    assert "--exchanges is 999999999999; it must be at most" in capsys.readouterr().err
    assert main(["model"]) == 2
    assert "(python -m contrib.budget --help lists what there is)" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "batch_size"), [(2, 1), (3, 2)])
def test_the_same_search_on_every_rank(size: int, batch_size: int) -> None:
    """Processes that share the windows take the same way to the same bits as one alone."""
    windows = random_windows(5)
    costs = CostTable("flops", 24, {r: (r,) * LAYERS for r in (1.0, 0.5, 0.0)})
    space = Space.of(costs, (0.5, 0.0), select=range(1, LAYERS), skip=range(1, LAYERS - 1))

    def search(evaluator: Evaluator) -> BudgetState:
        return budget_search(CalibrationLoss(evaluator), space, 0.7, starts={"SLEB": {2: 0.0, 3: 0.0}})

    def work(rank: Rank, stack: LayerStack) -> BudgetState:
        return search(Evaluator(stack, windows, batch_size=batch_size, processes=rank))

    alone = search(Evaluator(small_stack(), windows, batch_size=batch_size))
    for state in on_every_rank(size, work):
        assert list(state.seen) == list(alone.seen)
        assert best_plan(state, space, 0.7) == best_plan(alone, space, 0.7)
        assert state.settings == alone.settings


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda values: values["settings"].update(losses=3), "not the state of a budget search"),
        (lambda values: values["settings"]["losses"].update(batch_size=-1), "not the state of a budget search"),
        (lambda values: values["settings"].pop("costs"), "its costs is None"),
        (lambda values: values["seen"][2].__setitem__(1, "x"), "not the state of a budget search"),
        (lambda values: values["seen"].append([[[2, 0.77]], 1.0, None, None]), r"keep ratio 0\.77 is not in the table"),
    ],
)
def test_spoilt_states(
    run: tuple[Path, dict[str, Any], Watcher], tiny_folder: Path, tmp_path: Path, spoil: Any, words: str
) -> None:
    output, _, _ = run
    shutil.copytree(output, tmp_path / "out")
    state = tmp_path / "out" / "search-state.json"
    values = json.loads(state.read_text())
    spoil(values)
    state.write_text(json.dumps(values))
    with pytest.raises(OrthoRankError, match=words):
        run_search(settings(tiny_folder, tmp_path / "out", resume=True), Watcher())
