"""docs/correction.md: its code runs, and its figures of costs are those of the code."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig

from orthorank import OrthoRankConfig
from orthorank.stack.flops import Dimensions
from tests.orthorank.hub_server import look_at, serving
from tests.orthorank.models import plain

PAGE = (Path(__file__).parents[2] / "docs" / "correction.md").read_text(encoding="utf-8")


def test_the_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the page's order, in one process that is logged in at a Hub on this machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_writes")
    ids = torch.randint(3, 128, (8, 16), generator=torch.Generator().manual_seed(0))
    names: dict[str, Any] = {"model": plain("llama"), "windows": ids, "ids": ids[:2]}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    with serving() as hub:
        look_at(monkeypatch, hub.endpoint, str(tmp_path / "cache"))
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/correction.md, block {number}", "exec"), names)
            if number == 0:
                assert OrthoRankConfig.from_pretrained("corrected") == names["corrected"]
    repo = hub.repos["org/corrected"]
    assert repo.private
    assert capsys.readouterr().out == f"corrected with maps of rank 8: layers 1, 2\norg/corrected@{repo.refs['main']}\n"
    assert OrthoRankConfig.from_pretrained("corrected").correction == names["corrected"].correction.to("bfloat16")
    assert sorted(file.name for file in Path("corrected").iterdir()) == ["correction.safetensors", "orthorank.json"]


def test_what_a_map_costs() -> None:
    small = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, head_dim=64
    )
    large = LlamaConfig(num_key_value_heads=32)
    for config, share in ((small, "2 %"), (large, "0.3 %")):
        sizes = Dimensions.of(config)
        linear = sizes.layer(0, 1, 1) - 2 * sizes.query  # of one token, without its attention to itself
        found = 100 * 4 * 64 * sizes.hidden / linear
        assert f"{found:.0f} %" == share or f"{found:.1f} %" == share
        assert share in PAGE
    assert "`8 * rank * hidden` bytes a layer in float32: 2 MiB for 4,096 channels" in PAGE
    assert 8 * 64 * 4096 == 2 * 2**20
