"""examples/: each does what it says. Those of families, criteria and the paged layer are tested beside their pages."""

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig
from tests.examples import notebook
from tests.orthorank.models import plain

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICKSTART = EXAMPLES / "quickstart.ipynb"


def test_the_plain_layer_is_dense_where_all_tokens_are_selected(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_torch.py"))
    example["main"]()  # compares the two
    first, second, third = capsys.readouterr().out.splitlines()
    assert first == "layers 3 and 4 update 32 of 96 tokens"
    assert second.startswith("states change by ")
    assert third == "with all tokens selected it is the dense layer"


def test_the_plain_layer_updates_the_tokens_most_orthogonal_to_the_first() -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_torch.py"))
    torch.manual_seed(0)
    layer, h, tables = example["Block"](32, 2, 1, 64), torch.randn(1, 24, 32), example["rotary"](24, 16)
    with torch.no_grad():
        changed = (layer.selected(h, *tables, 8) != h).any(-1)[0]
        dense = layer(h, *tables)
    cosine = torch.cosine_similarity(h[0, 1:], h[:1, 0]).abs()
    assert (changed.nonzero()[:, 0] == 1 + cosine.topk(8, largest=False).indices.sort().values).all()
    assert changed.sum() == 8
    assert not torch.equal(dense[0, changed], h[0, changed])


def test_the_cells_are_those_that_printed_what_is_kept() -> None:
    """Each was run, in order; links lead to files that are there."""
    cells = notebook.code_cells(QUICKSTART)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(notebook.kept(cell)) for cell in cells) == len(cells)
    for name in ("own_criterion", "own_family", "healing", "serving", "plain_torch", "paged_layer"):
        assert f"({name}.py)" in QUICKSTART.read_text(encoding="utf-8")
        assert (EXAMPLES / f"{name}.py").is_file()


@pytest.mark.slow
def test_the_notebook_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    cells = notebook.code_cells(QUICKSTART)
    for cell, said in zip(cells, notebook.run(cells), strict=True):
        if "varies" in cell["metadata"].get("tags", ()):  # the text is that of this version of Python
            assert said.splitlines()[0].startswith("perplexity ")
        else:
            assert said == notebook.kept(cell)


@pytest.mark.slow
def test_healing_brings_a_plan_nearer_to_the_dense_model() -> None:
    pytest.importorskip("peft")
    example: dict[str, Any] = runpy.run_path(str(EXAMPLES / "healing.py"))
    ids = torch.randint(3, 128, (12, 24), generator=torch.Generator().manual_seed(0))
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
    found = example["heal"](plain("llama"), ids[:8], ids[8:], plan, steps=8, rank=8)
    assert list(found) == ["the plan", "corrections, distilled", "LoRA"]
    assert found["corrections, distilled"] < found["the plan"]
    assert found["LoRA"] < found["the plan"]


@pytest.mark.parametrize("name", ["healing", "own_criterion", "own_family", "paged_layer", "plain_torch", "serving"])
def test_help_is_said_at_once(name: str) -> None:
    """Without what the example needs: nothing but Python is imported before the command line is read."""
    only_python = [sys.executable, "-S", "-E"]  # no site-packages
    done = subprocess.run([*only_python, str(EXAMPLES / f"{name}.py"), "--help"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: {name}.py")
