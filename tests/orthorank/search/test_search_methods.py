"""Every method of ``orthorank search``, what it is measured on, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankConfig, OrthoRankError, cli
from orthorank.models import load_model
from orthorank.search.run import run_search
from orthorank.search.settings import SearchSettings
from orthorank.stack.layers import LayerStack
from tests.orthorank.search_runs import Watcher, calibration_ids, plan_in, settings, without_times

ONE_PASS = [("one-shot", "taylor"), ("one-shot", "magnitude"), ("influence", None)]
ALL = [("greedy", None), ("one-shot", "ppl"), *ONE_PASS]


@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
@pytest.mark.parametrize(("method", "metric"), [("one-shot", "ppl"), *ONE_PASS])
def test_the_lowest_scores_are_taken(
    tiny_folder: Path, tmp_path: Path, method: str, metric: str | None, keep_ratio: float
) -> None:
    from orthorank.search import Evaluator, block_influence, loss_scores, magnitude_scores, taylor_scores

    run_search(settings(tiny_folder, tmp_path, method=method, metric=metric, keep_ratio=keep_ratio, protect_first=1))
    plan = plan_in(tmp_path)
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    stack = LayerStack(model)
    ids = calibration_ids(tiny_folder, tokenizer)
    evaluator = Evaluator(stack, ids, keep_ratio=keep_ratio, batch_size=1)
    scores: dict[int, float] = {
        "ppl": lambda: loss_scores(evaluator, [1, 2, 3, 4]).finite,
        "taylor": lambda: taylor_scores(stack, ids),
        "magnitude": lambda: magnitude_scores(stack),
        None: lambda: block_influence(stack, ids),
    }[metric]()
    order = sorted([1, 2, 3, 4], key=lambda layer: scores[layer])[:2]
    record = plan["calibration"]
    assert record["order"] == order
    assert plan["layers"] == sorted(order)
    assert record["scores"] == {str(layer): score for layer, score in scores.items()}
    assert record["loss"] == evaluator.loss(order)
    assert record["dense_loss"] == evaluator.loss([])
    assert plan["keep_ratio"] == keep_ratio
    words = {"ppl": "one shot by ppl (Shortened LLaMA)", None: "block influence (ShortGPT)"}
    assert record["method"].startswith(words.get(metric, f"one shot by {metric}"))


def test_the_methods_leave_alone_what_their_papers_do() -> None:
    def protected(**options: Any) -> tuple[int, int]:
        return SearchSettings(output=Path("out"), **options).protected

    assert protected(method="greedy", keep_ratio=0.0) == (1, 1), "SLEB"
    assert protected(method="greedy") == (1, 2)
    assert protected(method="one-shot", keep_ratio=0.0) == protected(method="one-shot") == (4, 2), "the + heuristic"
    assert protected(method="influence", keep_ratio=0.0) == (0, 0), "ShortGPT"
    assert protected(method="influence") == (0, 2)
    assert protected(method="one-shot", protect_first=0, protect_last=0) == (0, 0)
    assert SearchSettings(output=Path("out")).floored
    assert not SearchSettings(output=Path("out"), keep_ratio=0.0).floored
    assert SearchSettings(output=Path("out"), keep_ratio=0.0, sink_layer=3).floored
    assert not SearchSettings(output=Path("out"), sink_floor=False).floored


def test_the_sink_is_the_floor(tiny_folder: Path, tmp_path: Path) -> None:
    run_search(settings(tiny_folder, tmp_path / "a", sink_floor=None, sink_layer=2, protect_last=None, layers=1))
    plan = plan_in(tmp_path / "a")
    assert plan["layers"] == [3], "after layer 2, without the last two of 6"
    assert plan["sink_layer"] == 2
    with pytest.raises(OrthoRankError, match=r"no sink: .*--sink-layer, or let all be candidates with --no-sink-floor"):
        run_search(settings(tiny_folder, tmp_path / "b", sink_floor=None))
    with pytest.raises(OrthoRankError, match="sink_layer is 6; the model has layers 0 to 5"):
        run_search(settings(tiny_folder, tmp_path / "c", sink_floor=None, sink_layer=6))


@pytest.mark.parametrize("stop", [1, 3])
def test_a_one_shot_search_goes_on(tiny_folder: Path, tmp_path: Path, stop: int) -> None:
    options: dict[str, Any] = {"method": "one-shot", "protect_first": 1, "batch_size": None}
    run_search(settings(tiny_folder, tmp_path / "whole", **options))
    with pytest.raises(OrthoRankError, match=rf"interrupted after {stop} of 4 evaluations; .* and --resume"):
        run_search(settings(tiny_folder, tmp_path / "part", **options), Watcher("losses", stop))
    watcher = Watcher()
    run_search(settings(tiny_folder, tmp_path / "part", resume=True, **options), watcher)
    assert without_times(tmp_path / "part") == without_times(tmp_path / "whole")
    assert [done for done, _ in watcher.notes] == list(range(stop, 5))
    assert all(note.startswith("layer ") and "; best: layer " in note for _, note in watcher.notes[1:])


@pytest.mark.parametrize(("method", "metric"), ONE_PASS)
def test_a_search_of_one_pass_is_repeated(tiny_folder: Path, tmp_path: Path, method: str, metric: str | None) -> None:
    options: dict[str, Any] = {"method": method, "metric": metric, "protect_first": 1}
    run_search(settings(tiny_folder, tmp_path, **options))
    before = without_times(tmp_path)
    with pytest.raises(OrthoRankError, match="has an earlier result"):
        run_search(settings(tiny_folder, tmp_path, **options))
    run_search(settings(tiny_folder, tmp_path, resume=True, **options))
    assert without_times(tmp_path) == before


def test_a_fast_search_resumes_as_a_fast_search_only(tiny_folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"fast": True, "windows": 8}
    run_search(settings(tiny_folder, tmp_path / "whole", **options))
    assert plan_in(tmp_path / "whole")["calibration"]["method"].startswith("greedy search (SLEB), fast")
    with pytest.raises(OrthoRankError, match="interrupted after 3 of "):
        run_search(settings(tiny_folder, tmp_path / "part", **options), Watcher("search", 3))
    with pytest.raises(OrthoRankError, match="its fast is true and now it is false"):
        run_search(settings(tiny_folder, tmp_path / "part", windows=8, resume=True))
    run_search(settings(tiny_folder, tmp_path / "part", resume=True, **options))
    assert without_times(tmp_path / "part") == without_times(tmp_path / "whole")


def test_the_batch_size_of_a_resumed_search_is_the_first_one_s(tiny_folder: Path, tmp_path: Path) -> None:
    """By memory it may come out differently the next time; the last bits depend on it."""
    run_search(settings(tiny_folder, tmp_path / "whole", batch_size=2))
    with pytest.raises(OrthoRankError, match="interrupted"):
        run_search(settings(tiny_folder, tmp_path / "part", batch_size=2), Watcher("search", 3))
    run_search(settings(tiny_folder, tmp_path / "part", batch_size=None, resume=True))
    assert without_times(tmp_path / "part") == without_times(tmp_path / "whole")
    with pytest.raises(OrthoRankError, match="state is of a search with 2 windows in a batch"):
        run_search(settings(tiny_folder, tmp_path / "part", batch_size=3, resume=True))


def test_a_loss_that_is_not_finite_is_null_in_the_plan(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer without which the model overflows is not chosen, and the file stays JSON that everyone can read."""
    from orthorank.search import Evaluator

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    loss = Evaluator.loss
    monkeypatch.setattr(
        Evaluator, "loss", lambda self, plan, *rest: math.inf if plan == [2] else loss(self, plan, *rest)
    )
    run_search(settings(tiny_folder, tmp_path, method="one-shot", keep_ratio=0.0, protect_first=1, layers=3))
    plan = json.loads((tmp_path / "orthorank.json").read_text(), parse_constant=no_constant)
    assert plan["layers"] == [1, 3, 4]
    assert plan["calibration"]["scores"]["2"] is None
    monkeypatch.undo()
    monkeypatch.setattr(Evaluator, "loss", lambda self, *rest: math.inf)
    with pytest.raises(OrthoRankError, match="the score of layer 1 is inf, and it would be chosen"):
        run_search(settings(tiny_folder, tmp_path / "all", method="one-shot", protect_first=1))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--method", "beam"], "method is 'beam'; it may be greedy, one-shot or influence"),
        (["--metric", "ppl"], "metric is for the method one-shot; the method is greedy, drop --metric"),
        (["--method", "one-shot", "--metric", "loss"], "metric is 'loss'; it may be ppl, taylor or magnitude"),
        (["--criterion", "best"], "criterion is 'best'; it may be 'orthogonal' or"),
        (["--keep-ratio", "1"], "keep_ratio is 1; it must be from 0 to below 1"),
        (["--keep-ratio", "some"], "keep_ratio is 'some'; it must be a number"),
        (["--sparsity", "2"], "sparsity is 2; it must be above 0 and below 1"),
        (["--sparsity", "0.1", "--layers", "3"], "both sparsity and layers say how many"),
        (["--layers", "0"], "layers is 0; it must be an integer, 1 or more"),
        (["--windows", "0"], "windows is 0; it must be an integer, 1 or more"),
        (["--window", "1"], "window is 1; it must be an integer, 2 or more"),
        (["--protect-last", "-1"], "protect_last is -1; it must be an integer, 0 or more"),
        (["--no-sink-floor", "--sink-layer", "3"], "sink_layer sets the floor that no_sink_floor takes away"),
        (["--method", "influence", "--fast"], "fast is for the method greedy"),
        (["--select", "threshold"], "orthorank calibrate --plan PLAN"),
        (["--select", "best"], "select is 'best'; it may be topk or window"),
        (["--select-window", "64"], "select_window is for select window; add --select window"),
        (["--select", "window", "--select-window", "0"], "select_window is 0"),
        (["--select", "window", "--keep-ratio", "0"], "removes layers, which select nothing"),
        (["--text", "a.txt", "--dataset", "c4"], "both text and dataset say what to calibrate on"),
        (["--text", "no-such-file.txt"], "text 'no-such-file.txt' cannot be read: No such file"),
        (["--dataset", "imdb"], "dataset is 'imdb'; it may be wikitext2 or c4"),
        (["--device", "cpu", "--device-map", "auto"], "both device and device_map say where the model goes"),
        (["--device-map", "clever"], "device_map is 'clever'; it may be auto, balanced"),
        (["--device", "abacus"], "device is 'abacus'; it may be auto, cpu, cuda or cuda:N"),
        (["--dtype", "int3"], "dtype is 'int3'; it may be float32, bfloat16, float16"),
        (["--frobnicate"], "No such option: --frobnicate"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    capsys: pytest.CaptureFixture[str], tiny_folder: Path, tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    assert cli.main(["search", str(tiny_folder), "--output", str(tmp_path / "out"), *arguments]) == 2
    said = capsys.readouterr().err
    assert sentence in said
    assert said.startswith("orthorank: ")
    assert said.count("\n") == 1
    assert not (tmp_path / "out" / "search.json").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sparsity": "0.2"}, "sparsity is '0.2'; it must be above 0 and below 1"),
        ({"keep_ratio": "a third"}, "keep_ratio is 'a third'; it must be from 0 to below 1"),
        ({"memory": "1"}, "memory is '1'; it must be 0 .keep nothing. or more, in GiB"),
        ({"memory": 10**400}, "memory is an integer of 1,329 bits; it must be"),
    ],
)
def test_settings_of_another_kind_are_a_sentence(tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        SearchSettings(output=tmp_path, **changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": 5}, "layers is 5 with keep ratio 1/3, and only 4 may be chosen"),
        ({"layers": None, "sparsity": 0.6}, "sparsity is 0.6, which needs 5 layers with keep ratio 1/3, and only 4"),
        ({"layers": None, "sparsity": 0.05}, "less than one layer of 6 with keep ratio 1/3; the smallest is 0.111"),
        ({"protect_first": 4, "protect_last": 2}, "no layer may be chosen: of 6 layers, 4 at the beginning and 2"),
        ({"window": 513}, "window is 513; the model's longest input has 512 tokens"),
        ({"windows": 10**6}, "is too short"),
    ],
)
def test_what_the_model_cannot_give_is_said(tiny_folder: Path, tmp_path: Path, changes: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        run_search(settings(tiny_folder, tmp_path, **changes))
    assert not (tmp_path / "search.json").exists()


@pytest.mark.parametrize(("method", "metric"), ALL)
def test_a_model_spread_by_accelerate_is_searched_as_it_is(
    tiny_folder: Path, tmp_path: Path, method: str, metric: str | None
) -> None:
    options: dict[str, Any] = {"method": method, "metric": metric, "protect_first": 1}
    run_search(settings(tiny_folder, tmp_path / "plain", **options))
    run_search(settings(tiny_folder, tmp_path / "auto", device="auto", device_map="auto", **options))
    plain, spread = (OrthoRankConfig.from_pretrained(tmp_path / name) for name in ("plain", "auto"))
    assert spread.calibration["order"] == plain.calibration["order"]
    assert spread.calibration["loss"] == pytest.approx(plain.calibration["loss"], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(("method", "metric"), [("one-shot", "taylor"), ("influence", None)])
def test_smollm2_is_searched_after_its_sink(tmp_path: Path, method: str, metric: str | None) -> None:
    """The sink is found, and a fifth of the work is left out."""
    options: dict[str, Any] = {"method": method, "metric": metric, "windows": 2, "window": 256, "device": "cpu"}
    options["sparsity"] = 0.2
    for name, keep_ratio in (("select", 1 / 3), ("remove", 0.0)):
        run_search(SearchSettings(output=tmp_path / name, keep_ratio=keep_ratio, **options))
    select, remove = (plan_in(tmp_path / name) for name in ("select", "remove"))
    assert (select["sink_layer"], remove["sink_layer"]) == (11, None)
    assert (len(select["layers"]), len(remove["layers"])) == (9, 6)
    assert set(select["layers"]) <= set(range(12, 28))
    assert select["calibration"]["scores"] == remove["calibration"]["scores"], "both are scores of the dense model"
    for plan in (select, remove):  # by how much is another matter: one shot does not see what layers are to each other
        assert plan["calibration"]["dense_loss"] < plan["calibration"]["loss"]
