"""docs/quickstart.md: its code runs, on a tiny model in place of one from the Hub and a GPU."""

import re
from pathlib import Path

import pytest
import torch

from orthorank import OrthoRankConfig

PAGE = (Path(__file__).parents[2] / "docs" / "quickstart.md").read_text(encoding="utf-8")


def test_the_code_runs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    OrthoRankConfig(layers=[2, 3]).save_pretrained("my-plan")  # what the command above the code writes
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    for shown, here in (
        ("HUB_ID_OR_PATH", str(tiny_folder)),
        ('"cuda"', '"cpu"'),
        ("max_new_tokens=32", "max_new_tokens=4"),
    ):
        assert block.count(shown) == 1
        block = block.replace(shown, here)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(block, "docs/quickstart.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if "selected" in line] == [["2", "selected"], ["3", "selected"]]
    assert "forward" not in vars(names["model"].model.layers[2])  # type: ignore[attr-defined]
