"""``orthorank search`` on a tiny saved model: what it writes, what it refuses, and that a killed search goes on."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, cli
from orthorank.common.texts import find_text
from orthorank.demo import Settings, run_demo
from orthorank.models import load_model
from orthorank.search.run import run_search
from tests.orthorank.search_runs import Watcher, calibration_ids, plan_in, settings, short_text, without_times

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Watcher, dict[str, Any]]:
    """A finished greedy search with token selection."""
    output, watcher = tmp_path_factory.mktemp("search") / "out", Watcher()
    return output, watcher, run_search(settings(tiny_folder, output), watcher)


def test_the_plan_says_where_it_is_from(finished: Any, tiny_folder: Path) -> None:
    from orthorank.common.texts import take_samples, tokenize
    from orthorank.evaluation import perplexity
    from orthorank.hf.apply import apply

    output, _, results = finished
    plan = OrthoRankConfig.from_pretrained(output)
    record = plan.calibration
    assert results["plan"] == plan_in(output)
    assert (len(plan.layers), plan.keep_ratio, plan.num_hidden_layers) == (2, pytest.approx(1 / 3), 6)
    assert set(plan.layers) <= {1, 2, 3, 4}
    assert sorted(record["order"]) == plan.layers
    assert (record["windows"], record["seq_len"], record["tokens"]) == (3, 32, 96)
    text = find_text(short_text(tiny_folder))
    assert (record["text"], record["text_sha256"]) == (text.name, text.sha256)
    assert record["evaluations"] == 4 + 3
    assert record["complete"] is True
    assert record["method"] == "greedy search (SLEB) among layers 1-4"
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    samples = take_samples(tokenize(text, tokenizer), windows=3, window=32, held_out_windows=3, held_out_len=32)
    dense = perplexity(model, samples.calibration)
    assert record["ids_sha256"] == dense.ids_sha256
    assert record["dense_loss"] == pytest.approx(dense.loss, rel=1e-6)
    assert plan.measured["dense_perplexity"] == perplexity(model, samples.held_out).perplexity
    with apply(model, plan):
        assert record["loss"] == pytest.approx(perplexity(model, samples.calibration).loss, rel=1e-5)
        assert plan.measured["perplexity"] == perplexity(model, samples.held_out).perplexity
    assert record["loss"] == record["losses"][-1]


@pytest.mark.parametrize("options", [{}, {"correct": 4, "fit_windows": 2}, {"max_loss": 5.0}], ids=str)
def test_a_plan_of_windows_is_searched_as_it_selects(tiny_folder: Path, tmp_path: Path, options: Any) -> None:
    from orthorank.evaluation import perplexity
    from orthorank.hf.apply import apply

    chosen = settings(tiny_folder, tmp_path / "out", select="window", select_window=8, **options)
    results = run_search(chosen, watcher := Watcher())
    assert any("of the tokens of each window of 8 tokens in" in said for said in watcher.said)
    with pytest.raises(OrthoRankError, match="select_window is 32, and a calibration window has 32 tokens"):
        run_search(dataclasses.replace(chosen, output=tmp_path / "wide", select_window=32))
    plan = OrthoRankConfig.from_pretrained(tmp_path / "out")
    assert (plan.select, plan.select_window) == ("window", 8)
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    ids = calibration_ids(tiny_folder, tokenizer)
    losses = []
    for select in ({"select": "window", "select_window": 8}, {"select": "topk", "select_window": None}):
        with apply(model, dataclasses.replace(plan, **select)):
            losses.append(perplexity(model, ids).loss)
    assert losses[0] != losses[1], "top-k selects other tokens"
    if "correct" not in options:  # whose last fit is on more windows than a round's
        assert plan.calibration["loss"] == pytest.approx(losses[0], rel=1e-5)
    held_out = results["rows"][-1]["perplexity"]
    assert held_out == plan.measured["perplexity"]
    with pytest.raises(OrthoRankError, match="select"):
        run_search(dataclasses.replace(chosen, select="topk", select_window=None, resume=True))


def test_the_plan_is_sleb_s_when_layers_are_removed(tiny_folder: Path, tmp_path: Path) -> None:
    """Against SLEB's loop as it is written down, on the patched model itself."""
    from orthorank.evaluation import perplexity
    from orthorank.hf.apply import apply

    run_search(settings(tiny_folder, tmp_path / "out", keep_ratio=0.0, protect_last=None))
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    ids = calibration_ids(tiny_folder, tokenizer)
    removed: list[int] = []
    for _ in range(2):
        losses = {}
        for layer in (c for c in range(1, 5) if c not in removed):
            with apply(model, OrthoRankConfig(layers=[*removed, layer], keep_ratio=0.0)):
                losses[layer] = perplexity(model, ids).loss
        removed.append(min(losses, key=lambda layer: losses[layer]))
    assert plan_in(tmp_path / "out")["calibration"]["order"] == removed


def test_the_watcher_sees_rounds_candidates_and_the_best(finished: Any) -> None:
    _, watcher, results = finished
    done = [part for part, note in watcher.notes]
    assert done == list(range(1, 8))
    form = r"round [12]/2, layer [1-4]; best: layer [1-4], \d+\.\d{4}"
    assert all(re.fullmatch(form, note) for _, note in watcher.notes), watcher.notes
    rounds = [words for words in watcher.said if words.startswith("round ")]
    best, order = results["plan"]["calibration"]["losses"], results["plan"]["calibration"]["order"]
    assert rounds == [f"round {n + 1} of 2: best loss {best[n]:.4f} (layer {order[n]})" for n in (0, 1)]


def test_the_watcher_knows_after_one_evaluation_how_long_the_search_takes(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation of layer 1 of 6 computes 5 layers, one of the candidates 1 to 4 on average 3.5."""
    hours = iter(range(0, 10**9, 3600))
    monkeypatch.setattr("orthorank.search.run.time.perf_counter", lambda: float(next(hours)))
    run_search(settings(tiny_folder, tmp_path / "out"), watcher := Watcher())
    assert [said for said in watcher.said if "evaluations" in said] == ["6 evaluations are left, about 4.2 h"]


def test_an_earlier_result_is_not_overwritten(finished: Any, tiny_folder: Path) -> None:
    output, _, _ = finished
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(OrthoRankError, match=r"has an earlier result \(search.json, .*adding --resume, or name"):
        run_search(settings(tiny_folder, output))
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


def test_a_plan_that_no_search_made_is_not_overwritten_by_resume(tiny_folder: Path, tmp_path: Path) -> None:
    OrthoRankConfig(layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(OrthoRankError, match="plan without the search that made it"):
        run_search(settings(tiny_folder, tmp_path, resume=True))
    assert plan_in(tmp_path)["layers"] == [1]


def test_a_finished_search_resumed_repeats_nothing(finished: Any, tiny_folder: Path) -> None:
    output, _, _ = finished
    before, watcher = without_times(output), Watcher()
    run_search(settings(tiny_folder, output, resume=True), watcher)
    assert without_times(output) == before
    assert [done for done, _ in watcher.notes] == [7]
    assert "resumed after 7 of 7 evaluations" in watcher.said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"window": 31}, "its calibration text or windows are not this one's; resume with the same"),
        ({"layers": 3}, "its layers is 2 and now it is 3"),
        ({"keep_ratio": 0.5}, "its keep_ratio is 0.333"),
        ({"protect_first": 2}, r"its candidates is \[1, 2, 3, 4\] and now it is \[2, 3, 4\]"),
        ({"dtype": "bfloat16"}, 'its dtype is "float32" and now it is "bfloat16"'),
        ({"select": "window", "select_window": 8}, 'its select is "topk" and now it is "window"'),
    ],
)
def test_another_search_is_not_resumed(finished: Any, tiny_folder: Path, changes: Any, words: str) -> None:
    output, _, _ = finished
    with pytest.raises(OrthoRankError, match=words):
        run_search(settings(tiny_folder, output, resume=True, **changes))


def test_another_model_is_not_resumed(tiny_folder: Path, tmp_path: Path) -> None:
    """A model of the same name and shape with another configuration, and with other weights."""
    import shutil

    from tests.orthorank.models import plain

    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    run_search(settings(folder, tmp_path / "out"))
    config, kept = (json.loads(file.read_text()) for file in (folder / "config.json", tmp_path / "out" / "search.json"))
    other = json.dumps(config | {"rms_norm_eps": 0.1})
    (folder / "config.json").write_text(other)
    with pytest.raises(OrthoRankError, match=r"its model's settings \(config.json\) are not"):
        run_search(settings(folder, tmp_path / "out", resume=True))
    del kept["search"]["config_fingerprint"]  # as earlier versions wrote it
    (tmp_path / "out" / "search.json").write_text(json.dumps(kept))
    run_search(settings(folder, tmp_path / "out", resume=True))
    plain("llama", seed=5, vocab_size=256, num_hidden_layers=6).save_pretrained(folder)
    (folder / "config.json").write_text(other)
    with pytest.raises(OrthoRankError, match="its model's weights are not this one's"):
        run_search(settings(folder, tmp_path / "out", resume=True))


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_ctrl_c_keeps_the_rounds_and_the_search_goes_on(
    finished: Any, tiny_folder: Path, tmp_path: Path, stop: int
) -> None:
    output, _, _ = finished
    with pytest.raises(OrthoRankError, match=rf"interrupted after {stop} of 7 .*with the same command and --resume"):
        run_search(settings(tiny_folder, tmp_path), Watcher("search", stop))
    if stop < 4:
        assert not (tmp_path / "orthorank.json").exists()
    else:
        partial = plan_in(tmp_path)
        assert partial["layers"] == plan_in(output)["calibration"]["order"][:1]
        assert partial["calibration"]["complete"] is False
    watcher = Watcher()
    run_search(settings(tiny_folder, tmp_path, resume=True), watcher)
    assert without_times(tmp_path) == without_times(output)
    assert [done for done, _ in watcher.notes] == list(range(stop, 8)), "nothing is measured twice"


def test_ctrl_c_while_measuring_leaves_the_plan(finished: Any, tiny_folder: Path, tmp_path: Path) -> None:
    output, _, _ = finished
    with pytest.raises(OrthoRankError, match=r"interrupted while the plan was measured; it is in .*orthorank.json"):
        run_search(settings(tiny_folder, tmp_path), Watcher("measuring the plan", 0))
    assert plan_in(tmp_path)["layers"] == plan_in(output)["layers"]


def test_a_killed_search_goes_on_to_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    """kill -9 in the middle of the evaluations of a real process."""
    options = [
        *("search", str(tiny_folder), "--device", "cpu", "--no-sink-floor", "--protect-last", "1", "--layers", "2"),
        *("--windows", "24", "--window", "256", "--batch-size", "1"),
    ]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "orthorank", *options, "--output", str(killed)],
        stdout=subprocess.DEVNULL,
        env=os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        cwd=ROOT,
    )
    state, deadline = killed / "search-state.json", time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    at_kill = json.loads(state.read_text())
    assert len(at_kill["chosen"]) < 2, "killed before the end"
    assert not (killed / "orthorank.json").exists()
    assert cli.main([*options, "--output", str(killed), "--resume"]) == 0
    assert cli.main([*options, "--output", str(whole)]) == 0
    assert without_times(killed) == without_times(whole)
    assert plan_in(whole)["calibration"]["text_sha256"] == find_text().sha256, "the text that the demo uses, too"
    assert not list(killed.glob("*.part"))


def test_the_demo_takes_the_plan(finished: Any, tiny_folder: Path, tmp_path: Path) -> None:
    output, _, results = finished
    measured = run_demo(
        Settings(
            model=str(tiny_folder),
            output=tmp_path,
            device="cpu",
            plan=str(output),
            windows=2,
            window=32,
            held_out_windows=2,
            held_out_len=32,
            prompt_tokens=32,
            rounds=1,
        )
    )
    ortho = next(row for row in measured["rows"] if row["name"] == "orthorank")
    assert ortho["layers"] == results["plan"]["layers"]
    assert measured["complete"] is True


def test_the_demo_takes_a_plan_that_removes_layers(tiny_folder: Path, tmp_path: Path) -> None:
    """It is the row of layer pruning; OrthoRank's layers are searched at its sparsity."""
    run_search(settings(tiny_folder, tmp_path / "search", keep_ratio=0.0))
    measured = run_demo(
        Settings(
            model=str(tiny_folder),
            output=tmp_path / "demo",
            device="cpu",
            plan=str(tmp_path / "search"),
            sink_layer=0,
            windows=1,
            window=32,
            rank=0,
            held_out_windows=1,
            held_out_len=32,
            prompt_tokens=32,
            rounds=1,
        )
    )
    rows = {row["name"]: row for row in measured["rows"]}
    assert rows["layer-pruning"]["layers"] == plan_in(tmp_path / "search")["layers"]
    assert rows["layer-pruning"]["keep_ratio"] == 0
    assert len(rows["orthorank"]["layers"]) == 3, "2 of 6 layers removed, or 3 of them at 1/3"


def test_the_demo_takes_a_plan_of_mixed_ratios(tiny_folder: Path, tmp_path: Path) -> None:
    OrthoRankConfig(layers=[1, 2, 4], keep_ratio=1 / 3, keep_ratios={2: 0.0}).save_pretrained(tmp_path / "plan")
    measured = run_demo(
        Settings(
            model=str(tiny_folder),
            output=tmp_path / "demo",
            device="cpu",
            plan=str(tmp_path / "plan"),
            windows=1,
            window=32,
            rank=0,
            held_out_windows=1,
            held_out_len=32,
            prompt_tokens=32,
            rounds=1,
        )
    )
    ortho = next(row for row in measured["rows"] if row["name"] == "orthorank")
    assert (ortho["layers"], ortho["keep_ratios"]) == ([1, 2, 4], {"2": 0.0})
    assert "3 layers changed, 2 at 1/3, 1 removed" in (tmp_path / "demo" / "report.html").read_text()


def test_the_demo_refuses_a_plan_that_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    OrthoRankConfig(layers=[1, 2], keep_ratio=1.0).save_pretrained(tmp_path / "plan")
    with pytest.raises(OrthoRankError, match="changes nothing"):
        run_demo(Settings(model=str(tiny_folder), output=tmp_path / "demo", device="cpu", plan=str(tmp_path / "plan")))
