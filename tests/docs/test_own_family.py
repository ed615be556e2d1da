"""Docs and example of a family of one's own: what they show is what happens."""

import contextlib
import io
import re
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import FAMILIES, OrthoRankConfig, apply
from tests.orthorank.statement import DenseRows, assert_close, call

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _families_as_they_were() -> Iterator[None]:
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)


def test_the_code_of_the_page_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    for number, block in enumerate(blocks):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, f"docs/families.md, block {number}", "exec"), names)
        promised = [line[2:] for line in block.splitlines() if line.startswith("# ")]
        assert printed.getvalue().splitlines() == promised


def test_the_example_refuses_the_wrong_spec_and_follows_the_plan() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "own_family.py"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        example["main"]()
    wrong, checked, *table = printed.getvalue().splitlines()
    promised = re.search(r"print\(error\)  # \.\.\. (.*?) \.\.\.", (ROOT / "examples" / "own_family.py").read_text())
    assert promised is not None
    assert promised[1] in wrong
    assert re.fullmatch(r"largest difference: \de-07", checked)
    assert sum("selected" in line for line in table) == 3


def test_the_family_of_the_example_gives_the_rows_of_the_dense_layer() -> None:
    example = runpy.run_path(str(ROOT / "examples" / "own_family.py"))
    FAMILIES["glm4"] = example["GLM_4"]
    model = example["small_model"]()
    ids, mask = torch.arange(1, 61).view(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        with DenseRows(model, [2, 3], 0.4) as rows:
            expected = rows(ids, mask)[mask.bool()]
        with apply(model, OrthoRankConfig(layers=[2, 3], keep_ratio=0.4)):
            assert_close(call(model, ids, mask)[mask.bool()], expected)
