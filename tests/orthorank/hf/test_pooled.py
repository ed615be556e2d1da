"""Models that do not generate: each row's last token, whose state is pooled, is updated unless it is said not to."""

import copy
from typing import Any

import pytest
import torch
from torch.nn.functional import cosine_similarity

from orthorank import OrthoRankConfig, apply
from orthorank.plans import default_plan
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny
from tests.orthorank.statement import assert_close

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=0.2)


def classifier(name: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny(name).config).float().eval()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_the_last_token_is_updated(kind: str) -> None:
    """As `prefilling` and `generate()` of the whole model do it; with ``keep_last=0`` as plain calls of that."""
    whole, ids = tiny("qwen3"), ids_of(2, 24)
    model = whole.model if kind == "encoder" else classifier("qwen3")
    with apply(model, PLAN) as handle:
        default, seen = model(ids)[0], []
        with handle.watching(lambda layer, positions, call: seen.append(positions)):
            model(ids)
        with handle.prefilling(keep_last=0):
            unforced = model(ids)[0]
        with handle.prefilling(keep_last=1):
            assert torch.equal(model(ids)[0], default)
    assert all((positions == 23).any(dim=1).all() for positions in seen)
    assert not torch.equal(default, unforced)
    if kind == "encoder":
        with apply(whole, PLAN) as handle:
            assert torch.equal(whole.model(ids)[0], unforced)
            with handle.prefilling():
                assert torch.equal(whole.model(ids)[0], default)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(side: str) -> None:
    """Its own last token, not the batch's."""
    model, rows = classifier("llama-2"), [ids_of(1, n, seed=n) for n in (21, 9)]
    ids, mask = torch.zeros(2, 21, dtype=torch.long), torch.zeros(2, 21, dtype=torch.long)
    for i, row in enumerate(rows):
        span = slice(21 - row.shape[1], 21) if side == "left" else slice(0, row.shape[1])
        ids[i, span], mask[i, span] = row[0], 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, PLAN):
        together = model(ids, attention_mask=mask, position_ids=positions).logits
        alone = torch.cat([model(row).logits for row in rows])
    assert_close(together, alone)


@torch.no_grad()
def test_the_plan_and_copies_say_how_many() -> None:
    model, ids = tiny("llama-2").model, ids_of(1, 24)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.2, keep_last=0)) as handle:
        none = model(ids)[0]
        with handle.prefilling(keep_last=1):
            assert not torch.equal(model(ids)[0], none)
    with apply(model, PLAN):
        assert not torch.equal(model(ids)[0], none)
        assert torch.equal(copy.deepcopy(model)(ids)[0], model(ids)[0])


@torch.no_grad()
def test_the_pooled_state_of_smollm2(smollm2: Any) -> None:
    """With the plan shipped for 20 %: nearer to the dense model's than where the last token may be left out."""
    whole, tokenizer = smollm2
    text = "Gravity is the force by which a planet or other body draws objects toward its center. " * 4
    ids, model = tokenizer(text, return_tensors="pt").input_ids, whole.model
    dense = model(ids)[0][0, -1]
    with apply(model, default_plan(whole, sparsity=0.2)) as handle:
        kept = model(ids)[0][0, -1]
        with handle.prefilling(keep_last=0):
            left_out = model(ids)[0][0, -1]
    assert cosine_similarity(kept, dense, dim=0) > 0.98
    assert cosine_similarity(left_out, dense, dim=0) < 0.95
