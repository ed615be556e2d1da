"""What a model with a plan refuses, by each way in; and a plan that is not followed is an error, never silence."""

from functools import partial
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_layer import ids_of

PLAN = OrthoRankConfig(layers=[1, 2])
RESTART = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
BOUNDARIES = torch.tensor([0, 4, 8], dtype=torch.int32)


@pytest.fixture
def model(tiny_model: Any) -> Any:
    return tiny_model("llama")


def test_after_one_forward_every_counter_is_one(model: Any) -> None:
    with apply(model, PLAN) as handle, torch.no_grad():
        model(ids_of(1, 8))
        assert {layer: counts.calls for layer, counts in handle.stats.items()} == {1: 1, 2: 1}


@pytest.mark.parametrize("ratio", [0.0, 1 / 3, 1.0])
def test_a_layer_that_was_exchanged_is_named(model: Any, tiny_model: Any, ratio: float) -> None:
    """The plan's patch is on the old layer: without a word, the new one would run dense."""
    ids = ids_of(1, 8)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=ratio)), torch.no_grad():
        model.model.layers[2] = tiny_model("llama", seed=1).model.layers[2]
        with pytest.raises(OrthoRankError, match="layer 2 of the plan did not run in this call"):
            model(ids)
        with pytest.raises(OrthoRankError, match="layer 2 of the plan did not run in this call"):
            model.generate(ids, max_new_tokens=2, pad_token_id=0)


def test_a_forward_that_was_replaced_is_named(model: Any) -> None:
    layer = model.model.layers[1]
    with apply(model, PLAN), torch.no_grad():
        ours, layer.forward = layer.forward, type(layer).forward.__get__(layer)
        with pytest.raises(OrthoRankError, match="layer 1 of the plan did not run"):
            model(ids_of(1, 8))
        layer.forward = ours
        model(ids_of(1, 8))


def test_layers_that_the_model_itself_leaves_out(model: Any) -> None:
    """Early exit sets num_hidden_layers for a while; the layers above were not asked for."""
    with apply(model, PLAN), torch.no_grad():
        model.config.num_hidden_layers = 2
        model(ids_of(1, 8))


@pytest.mark.parametrize(
    "kwargs",
    [
        {"position_ids": RESTART},
        {"position_ids": RESTART, "use_cache": False},
        {"position_ids": RESTART, "attention_mask": torch.ones(1, 8, dtype=torch.long)},
        {"position_ids": torch.tensor([[0, 1, 2, 3, 6, 7, 8, 9]])},
        {"position_ids": RESTART, "cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES, "max_length_q": 4},
        {"cu_seq_lens_q": BOUNDARIES, "cu_seq_lens_k": BOUNDARIES, "max_length_q": 4, "max_length_k": 4},
        {"seq_idx": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)},
    ],
    ids=lambda kwargs: "+".join(kwargs),
)
@pytest.mark.parametrize("way", ["model", "decoder", "prefilling", "generate"])
def test_packed_rows(model: Any, kwargs: dict[str, Any], way: str) -> None:
    ids = ids_of(1, 8)
    with apply(model, PLAN) as handle, torch.no_grad():
        ways = {
            "model": model,
            "decoder": model.model,
            "prefilling": handle.prefilling()(model),  # a context manager around each call
            "generate": partial(model.generate, max_new_tokens=2, pad_token_id=0),
        }
        with pytest.raises(OrthoRankError, match="packed sequences"):
            ways[way](ids, **kwargs)


def test_packed_rows_of_decoding_are_dense(model: Any) -> None:
    ids = ids_of(1, 8)
    with torch.no_grad():
        dense = model(ids, position_ids=RESTART, use_cache=False).logits
        with apply(model, PLAN) as handle, handle.decoding():
            assert torch.equal(model(ids, position_ids=RESTART, use_cache=False).logits, dense)
            with pytest.raises(OrthoRankError, match="cu_seq_lens_q was given"):
                model(ids, cu_seq_lens_q=BOUNDARIES)


def test_packed_rows_in_a_later_chunk(model: Any) -> None:
    with apply(model, PLAN), torch.no_grad():
        cache = model(ids_of(1, 4), use_cache=True).past_key_values
        with pytest.raises(OrthoRankError, match="packed sequences"):
            model(ids_of(1, 8), past_key_values=cache, position_ids=RESTART + 4)


def test_positions_of_padding_may_be_anything(model: Any) -> None:
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0]])
    ids, positions = ids_of(2, 8), (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with apply(model, PLAN), torch.no_grad():
        first = model(ids, attention_mask=mask, position_ids=positions).logits
        again = model(ids, attention_mask=mask, position_ids=positions.masked_fill(mask == 0, 7)).logits
    assert torch.equal(first[mask.bool()], again[mask.bool()])


def test_continuous_batching(model: Any) -> None:
    with apply(model, PLAN):
        for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
            with pytest.raises(OrthoRankError, match=f"{name} packs the tokens of many requests into one row"):
                getattr(model, name)(inputs=[[3, 4, 5]])
    assert "generate_batch" not in vars(model)


@pytest.mark.parametrize("name", ["output_attentions", "output_router_logits"])
def test_outputs_that_a_selecting_layer_has_not(model: Any, name: str) -> None:
    model.set_attn_implementation("eager")
    ids = ids_of(1, 8)
    with apply(model, PLAN), torch.no_grad():
        with pytest.raises(OrthoRankError, match=f"{name} is True"):
            model.model(ids, **{name: True})
        setattr(model.config, name, True)
        with pytest.raises(OrthoRankError, match=f"{name} is True"):
            model(ids)
