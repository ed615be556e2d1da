"""An exported plan is an ordinary checkpoint: an engine without a plan answers as the Hugging Face path with it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.engines import ask, check, engine, expect, prompts, unlike

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_an_exported_checkpoint(checkpoints: dict[str, Path], tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    from orthorank import OrthoRankConfig, export_pruned

    folder, asked = checkpoints[model_type], prompts([7, 30, 200])
    plan: dict[str, Any] = {"layers": [0, 2], "keep_ratio": 0.0}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with engine(export_pruned(model, OrthoRankConfig(**plan), tmp_path / "smaller")) as llm:
        found = ask(llm, asked)
    check(found, expect(folder, plan, asked))
    unlike(found, expect(folder, plan | {"keep_ratio": 1.0}, asked))
