"""docs/export.md: its code runs and prints what it says."""

import re
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("number", [1, pytest.param(2, marks=pytest.mark.slow)], ids=["checkpoint", "torch.export"])
def test_the_code_runs(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    for block in blocks[:number]:
        exec(compile(block, "docs/export.md", "exec"), names)
    said = [line[2:] for block in blocks[:number] for line in block.splitlines() if line.startswith("# ")]
    assert capsys.readouterr().out.splitlines() == said
