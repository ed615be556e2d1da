"""Corrected plans in processes of their own: compiled, the second model runner, tensor parallel."""

from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import check, corrected, expect, prompts, served, settings
from tests.vllm.jobs import SECOND, TWO_RANKS, answers, compiled_by

pytestmark = pytest.mark.vllm
# The first layer is removed, too: no residual comes to it.
PLAN: dict[str, Any] = {
    "layers": [0, 1, 2, 3],
    "keep_ratio": 0.5,
    "keep_ratios": {0: 0.0, 2: 0.0},
    "select": "window",
    "select_window": 32,
}
WAYS = {
    "dynamo": {"enforce_eager": False},
    "inductor": {"enforce_eager": False},
    "second runner": {},
    "two ranks": {"tensor_parallel_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_corrected_plan(tmp_path: Path, llama: Path, way: str) -> None:
    """Chunks of 100 tokens, which share steps with generated ones."""
    environment = {"second runner": SECOND, "two ranks": TWO_RANKS}.get(way) or compiled_by(way, tmp_path)
    maps, asked = corrected(tmp_path / "plan", PLAN, [0, 1, 2]), prompts([7, 30, 64, 110])
    others = {"max_num_batched_tokens": 100, "enable_prefix_caching": False} | WAYS[way]
    check(answers(tmp_path, settings(llama, served(maps), **others), asked, environment), expect(llama, maps, asked))


def test_bfloat16_runs(tmp_path: Path, llama: Path) -> None:
    """Maps are rounded to it, so results are near, not the same."""
    maps, asked = corrected(tmp_path / "plan", PLAN, [0, 1, 2]), prompts([7, 30, 64, 110])
    chosen = settings(llama, served(maps), enable_prefix_caching=False) | {"dtype": "bfloat16"}
    pairs = zip(answers(tmp_path, chosen, asked, {}), expect(llama, maps, asked), strict=True)
    apart = [abs(a - b) for found, wanted in pairs for a, b in zip(found.prompt, wanted.prompt, strict=True)]
    assert sum(apart) / len(apart) < 0.1
