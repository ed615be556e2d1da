"""Where tensors have no values (FakeTensorMode) a plan asks for none: the shapes come out."""

from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from orthorank import OrthoRankConfig, apply
from tests.orthorank.models import BASE

IDS = torch.arange(48).view(2, 24)
MASK = torch.ones_like(IDS)
PLANS = {
    "share": OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3),
    "window": OrthoRankConfig(layers=[1, 2], keep_ratio=0.25, select="window", select_window=8),
}
CALLS: dict[str, Any] = {
    "ids": {"input_ids": IDS},
    "mask": {"input_ids": IDS, "attention_mask": MASK},
    "positions": {"input_ids": IDS, "position_ids": torch.arange(24)[None]},
    "embeddings": {"inputs_embeds": torch.zeros(2, 24, 64)},
}


@torch.no_grad()
@pytest.mark.parametrize("call", list(CALLS))
@pytest.mark.parametrize("plan", list(PLANS))
def test_fake_tensors(plan: str, call: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = LlamaForCausalLM(LlamaConfig(**BASE)).eval()
        inputs = {name: mode.from_tensor(value) for name, value in CALLS[call].items()}
        model(**inputs)  # the dense model runs
        handle = apply(model, PLANS[plan])
        logits = model(**inputs).logits
        assert logits.shape == (2, 24, 128)
        assert all(layer.ran for layer in handle.layers)
        assert not handle.unmasked.done, "what was not looked at is looked at when there is something to see"
