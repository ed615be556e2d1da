"""The demo's answers to prompts: those of its plans, in its report, and refused before the long work starts."""

import json
from pathlib import Path

import pytest

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.cli import main
from orthorank.demo import run_demo
from orthorank.demo.measure import ANSWER_TOKENS
from orthorank.evaluation.compare import compare_plans
from orthorank.evaluation.prompts import read_prompts
from orthorank.models import load_model
from orthorank.report import words
from tests.orthorank.demo.test_demo import Watcher, settings
from tests.orthorank.report.test_report import Page


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text("The <b>river</b>\nBoats\n")
    return file


def test_the_report_has_what_compare_finds(tiny_folder: Path, tmp_path: Path, prompts: Path) -> None:
    output = tmp_path / "demo"
    given = settings(tiny_folder, output, layers=[2, 3], sparsity=None, prompts=prompts)
    results = run_demo(given, watcher := Watcher())
    model, tokenizer, _ = load_model(str(tiny_folder), device="cpu")
    files = ("orthorank-pruning.json", "orthorank.json", "corrected-pruning", "corrected")
    names = ("layer pruning (SLEB)", "OrthoRank", "layer pruning, corrected", "OrthoRank, corrected")
    plans = {name: OrthoRankConfig.from_pretrained(output / file) for name, file in zip(names, files, strict=True)}
    mine = compare_plans(model, tokenizer, plans, read_prompts(prompts), max_new_tokens=ANSWER_TOKENS)
    found = json.loads((output / "results.json").read_text())["compare"]
    assert found == json.loads(json.dumps(mine | {"max_new_tokens": ANSWER_TOKENS, "text": None}))
    assert results["complete"] is True
    assert watcher.seen["answers"] == [(1, ""), (2, "")]
    page = Page((output / "report.html").read_text())
    assert "The <b>river</b>" in page.text
    assert page.count("b") == 0, "what prompts hold is no markup"
    for _, cells in words.compared(mine)[1]:
        assert " ".join(cells) in page.text
    for row in mine["prompts"]:
        assert " ".join(row["dense"]["answer"].split()) in page.text


def test_a_prompt_that_is_too_long_is_refused_before_the_long_work(
    tiny_folder: Path, tmp_path: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts.write_text("x" * 500)
    with pytest.raises(OrthoRankError, match="prompt 1 has 500 tokens, and with an answer of max_new_tokens 32"):
        run_demo(settings(tiny_folder, tmp_path / "demo", prompts=prompts), watcher := Watcher())
    assert list(watcher.seen) == ["loading the model"]
    assert main(["demo", "--output", str(tmp_path / "demo"), "--prompts", str(tmp_path / "nowhere")]) == 2
    assert "nowhere' cannot be read" in capsys.readouterr().err
