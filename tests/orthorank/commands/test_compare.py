"""``orthorank compare``: what it prints and writes, its exit code, and that it goes on where it stopped."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankConfig, apply
from orthorank.cli import main
from orthorank.commands import compare as compare_command
from orthorank.commands.screen import RichScreen, console
from orthorank.evaluation import perplexity, windows
from orthorank.models import load_model
from orthorank.report.page import render
from tests.orthorank.report.test_report import Page
from tests.orthorank.search_runs import short_text

PLANS = {
    "orthorank": OrthoRankConfig(layers=[2, 3], keep_ratio=0.5),
    "layer pruning": OrthoRankConfig(layers=[2], keep_ratio=0),
}


@pytest.fixture
def line(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """A comparison of two plans on three prompts."""
    files = [str(plan.save_pretrained(tmp_path / name)) for name, plan in PLANS.items()]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The <b>river</b>\nThe old [bridge]\nBoats\n")
    named = ["--plan", files[0], "--plan", files[1], "--prompts", str(prompts)]
    small = ["--device", "cpu", "--max-new-tokens", "3", "--output", str(tmp_path / "out")]
    return ["compare", str(tiny_folder), *named, *small]


def test_the_command(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 0
    shown = " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert list(found["plans"]) == list(PLANS)
    for name, each in found["plans"].items():
        losses = [row["plans"][name]["loss"] - row["dense"]["loss"] for row in found["prompts"]]
        assert each["rise"]["mean"] == pytest.approx(statistics.fmean(losses))
        assert f"{each['rise']['mean']:+.4f} ± {each['rise']['standard_error']:.4f}" in shown
        assert each["plan"]["layers"] == PLANS[name].layers
    named = f"Plans: orthorank = {line[3]}, layer pruning = {line[5]}"
    assert named.replace(" ", "") in shown.replace(" ", ""), "a terminal breaks lines within a path, too"
    assert "The old [bridge]" in shown
    page = Page((tmp_path / "out" / "compare.html").read_text())
    assert "The <b>river</b>" in page.text
    assert page.count("b") == 0, "what prompts hold is no markup"
    for row in found["prompts"]:
        assert " ".join(row["dense"]["answer"].split()) in page.text
    assert main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_sample_leaves_out_what_is_too_long(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One request of a log would end it all; a prompt that was given by hand does."""
    (tmp_path / "prompts.txt").write_text(f"The river\n{'a' * 600}\nBoats\n")
    assert main(line) == 2
    assert "prompt 2 has 600 tokens" in capsys.readouterr().err
    log = "".join(f'{{"prompt": "{each}"}}\n' for each in ("The river", "a" * 600, "Boats")) + "{}\n"
    (tmp_path / "prompts.txt").write_text(log)
    assert main([*line, "--sample", "4"]) == 0
    shown = "".join(capsys.readouterr().out.split())  # a terminal breaks lines within a path, too
    assert "has3prompts,fewerthan--sample4:allofthemaretaken.Linesof" in shown
    assert "prompts.txtthatarenoprompts:1,leftout" in shown
    assert main([*line, "--sample", "3"]) == 0
    assert "Of the prompts drawn, 1 left out: too long for the model" in " ".join(capsys.readouterr().out.split())
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert (len(found["prompts"]), found["too_long"]) == (2, 1)
    assert "2 prompts (1 of those drawn are too long" in Page((tmp_path / "out" / "compare.html").read_text()).text
    (tmp_path / "prompts.txt").write_text("a" * 600)
    assert main([*line, "--sample", "3"]) == 2
    assert "sample is 3, and all prompts drawn are too long" in capsys.readouterr().err


def test_losses_of_a_text_are_paired_window_by_window(
    line: list[str], tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = short_text(tiny_folder)
    windows = ["--text", str(text), "--window", "32", "--windows", "5"]
    assert main([*line, *windows]) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    given: dict[str, Any] = {"text": text.read_text(), "tokenizer": tokenizer, "window": 32, "windows": 5}
    dense = perplexity(model, **given).window_losses
    for name, plan in PLANS.items():
        with apply(model, plan):
            own = perplexity(model, **given).window_losses
        differences = [b - a for a, b in zip(dense, own, strict=True)]
        rise = found["plans"][name]["rise"]
        assert rise["mean"] == pytest.approx(statistics.fmean(differences), abs=1e-5)
        assert rise["standard_error"] == pytest.approx(statistics.stdev(differences) / math.sqrt(5), abs=1e-5)
        assert (rise["n"], found["plans"][name]["answer_rise"]["n"]) == (5, 3)
    assert str(text) in " ".join(capsys.readouterr().out.split())


def test_empty_answers_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    """A chat model that is given no chat template ends at once; its answers looked as if nothing had been measured."""
    answer, one = {"answer": "\n", "same": True, "next_kl": 0.0, "answer_kl": 0.0}, {"mean": 0.0, "standard_error": 0.0}
    found = {"same": 2, "next_kl": one, "answer_kl": one, "rise": one}
    rows = [{"prompt": name, "tokens": 2, "dense": answer, "plans": {"orthorank": answer}} for name in ("a", "b")]
    results = {"model": {"name": "m", "dtype": "float32", "device": "cpu"}, "max_new_tokens": 3, "text": None}
    results |= {"plans": {"orthorank": found}, "prompts": rows, "too_long": 0, "verdicts": []}
    compare_command._show(RichScreen(console()), results, Path("out"))
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("(empty)") == 4
    assert "2 of 2 are empty: it ended at once" in shown
    assert "JSON lines with messages" in shown
    assert Page(render("compare.html.j2", results=results)).text.count("(empty)") == 2


def test_a_loss_that_falls_is_not_said_to_rise() -> None:
    rise = {"mean": -0.0025, "standard_error": 0.001, "most": -0.0005}
    assert compare_command._verdict("better", rise, 0.05) == (
        "better is within 0.05: its loss falls by 0.0025 ± 0.0010 nats a token."
    )


def test_the_exit_code_says_whether_every_plan_is_within_the_loss(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(line) == 0
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["plans"]
    low, high = sorted(each["rise"]["most"] for each in found.values())
    worse = max(found, key=lambda name: found[name]["rise"]["most"])
    assert 0 < low < high
    capsys.readouterr()
    for limit, code in ((high + 1e-4, 0), ((low + high) / 2, 1), (low / 2, 1)):
        assert main([*line, "--max-loss", f"{limit:.6f}"]) == code
        said = " ".join(capsys.readouterr().out.split())
        assert said.count(" is not within ") == (limit < low) + (limit < high)
        assert (f"{worse} is not within" in said) == (code == 1)
    assert "is not within" in Page((tmp_path / "out" / "compare.html").read_text()).text


def test_an_interrupted_comparison_goes_on(
    line: list[str],
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, measured = windows.measure, []

    def interrupted(screen: Any, name: str, *rest: Any) -> dict[str, Any]:
        measured.append(name)
        if measured == ["dense", "orthorank"]:
            raise KeyboardInterrupt
        return real(screen, name, *rest)

    monkeypatch.setattr(windows, "measure", interrupted)
    options = ["--text", str(short_text(tiny_folder)), "--window", "32", "--windows", "2"]
    assert main([*line, *options]) == 2
    assert "the same command goes on there" in capsys.readouterr().err
    rows = (tmp_path / "out" / "compare-state.jsonl").read_text().splitlines()
    assert len(rows) == 3 + 1, "three prompts, and the dense model's windows"
    assert main([*line, *options]) == 0
    assert measured == ["dense", "orthorank", "orthorank", "layer pruning"]
    assert (tmp_path / "out" / "compare-state.jsonl").read_text().splitlines()[:4] == rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-loss", "-1"], "max_loss is -1.0; it must be 0 or more"),
        (["--max-loss", "much"], "--max-loss is 'much'"),
        (["--max-new-tokens", "0"], "max_new_tokens is 0"),
        (["--window", "1"], "window is 1"),
        (["--windows", "0"], "windows is 0"),
        (["--prompts", "nowhere.txt"], "prompts 'nowhere.txt' cannot be read"),
        (["--plan", "nowhere"], "no plan can be read"),
        (["--bos", "twice"], "bos is 'twice'"),
        (["--text", "a.txt", "--dataset", "c4"], "both text and dataset are given"),
    ],
)
def test_what_is_refused(line: list[str], capsys: pytest.CaptureFixture[str], options: list[str], words: str) -> None:
    assert main([*line, *options]) == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_what_is_missing(line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line[:2]) == 2
    assert "plan is not given" in capsys.readouterr().err
    assert main(line[:4]) == 2
    assert "prompts is not given" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("only one")
    assert main([*line, "--max-loss", "0.5"]) == 2
    assert "max_loss is given with one prompt" in capsys.readouterr().err
