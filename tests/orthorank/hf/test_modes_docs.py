"""docs/modes.md: its code runs."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

MODES = (Path(__file__).parents[3] / "docs" / "modes.md").read_text(encoding="utf-8")


def test_the_code_runs(tiny_model: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {"model": tiny_model("llama"), "ids": torch.arange(3, 35).view(2, 16)}
    blocks = re.findall(r"```python\n(.*?)```", MODES, flags=re.DOTALL)
    assert len(blocks) == 2
    with torch.no_grad():
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/modes.md, block {number}", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["layer", "mode", "keep", "calls", "ranked", "updated", "share", "generated"]
    assert [line.split()[1] for line in lines[1:4]] == ["selected", "removed", "selected"]
    assert lines[1].split()[4:] == ["32", "8", f"{(2 + 2) / 16:.3f}", "0"], "of two windows of 8 a row"
    assert lines[4] == "dense: 0"
    assert names["logits"].shape == (2, 16, 128)
