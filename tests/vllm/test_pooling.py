"""Embeddings and classifiers: an engine gives the states and scores of the Hugging Face path with the plan."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vllm.conftest import TINY
from tests.vllm.engines import EQUAL, PLAN, WHOLE_PROMPTS, WINDOW, engine, prompts

pytestmark = pytest.mark.vllm
LENGTHS = [7, 30, 64, 200, 333]


def tokens(asked: list[list[int]]) -> list[dict[str, Any]]:
    return [{"prompt_token_ids": prompt} for prompt in asked]


def states(loader: Any, folder: Path, plan: dict[str, Any] | None, asked: list[list[int]]) -> list[torch.Tensor]:
    """The last token's states, or the scores of a classifier, by `apply`."""
    from orthorank import OrthoRankConfig, apply

    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    if plan is not None:
        apply(model, OrthoRankConfig(**plan))
    with torch.inference_mode():
        given = [model(torch.tensor([prompt]))[0] for prompt in asked]
    return [each[0, -1] if each.dim() == 3 else each[0] for each in given]


def distance(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("plan", [PLAN, WINDOW | {"min_prompt": 50}], ids=["topk", "window"])
def test_embeddings(llama_with_words: Path, plan: dict[str, Any]) -> None:
    """Several at once, and in chunks where the plan has windows; the last token's state is that of a prompt's end."""
    from transformers import AutoModel

    asked = prompts(LENGTHS)
    others = WHOLE_PROMPTS if plan is PLAN else {"max_num_batched_tokens": 100}
    with engine(llama_with_words, plan, skip_tokenizer_init=False, runner="pooling", convert="embed", **others) as llm:
        found = [torch.tensor(each.outputs.embedding) for each in llm.embed(tokens(asked), use_tqdm=False)]
    wanted = [torch.nn.functional.normalize(each, dim=0) for each in states(AutoModel, llama_with_words, plan, asked)]
    dense = [torch.nn.functional.normalize(each, dim=0) for each in states(AutoModel, llama_with_words, None, asked)]
    assert distance(found, wanted) < EQUAL
    assert distance(found, dense) > 100 * EQUAL


def test_a_classifier(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(**(TINY | {"num_labels": 3}))
    LlamaForSequenceClassification(config).float().save_pretrained(tmp_path)
    asked = prompts(LENGTHS, seed=1)
    with engine(tmp_path, PLAN, runner="pooling", convert="classify", **WHOLE_PROMPTS) as llm:
        found = [torch.tensor(each.outputs.probs) for each in llm.classify(tokens(asked), use_tqdm=False)]
    loader = AutoModelForSequenceClassification
    wanted = [each.softmax(-1) for each in states(loader, tmp_path, PLAN, asked)]
    assert distance(found, wanted) < EQUAL
    assert distance(found, [each.softmax(-1) for each in states(loader, tmp_path, None, asked)]) > 10 * EQUAL
