"""Padding is read from every kind of mask that a model may be called with, or refused by name."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.calls.masks import valid_columns
from orthorank.calls.reading import cache_of
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.statement import assert_close

LEFT = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]])


def causal(mask: torch.Tensor) -> torch.Tensor:
    tokens = mask.shape[1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return (lower & mask.bool()[:, None, :])[:, None]


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize(
    "mask",
    [
        LEFT,
        LEFT.bool(),
        LEFT.float(),
        causal(LEFT),
        additive(causal(LEFT)),
        {"full_attention": causal(LEFT), "sliding_attention": None},
        torch.cat([LEFT, torch.zeros(3, 4, dtype=torch.long)], dim=1),
    ],
    ids=["2-D int", "2-D bool", "2-D float", "4-D bool", "4-D float", "dict", "2-D longer than the tokens"],
)
def test_left_padding_is_read(mask: Any) -> None:
    columns = valid_columns(mask, 5, 3)
    assert columns is not None
    assert columns[0].tolist() == [2, 0, 4]
    assert columns[1].tolist() == [5, 5, 5]


def test_right_padding_and_empty_rows() -> None:
    columns = valid_columns(torch.tensor([[1, 1, 0], [0, 0, 0]]), 3, 2)
    assert columns is not None
    assert columns[0].tolist() == [0, 3]
    assert columns[1].tolist() == [2, 3]


@pytest.mark.parametrize("mask", [None, torch.ones(2, 4), causal(torch.ones(2, 4)), {"full_attention": None}])
def test_no_padding_is_none(mask: Any) -> None:
    assert valid_columns(mask, 4, 2) is None


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]]), "attention_mask has holes in row 1"),
        (torch.ones(1, 3), "covers 3 tokens; it must cover all 4"),
        (torch.ones(1, 4, 4), r"a Tensor of shape \[1, 4, 4\]"),
        ("BlockMask", "attention_mask is a str"),
        ({"sliding_attention": causal(torch.ones(1, 4))}, "holds only 'sliding_attention'"),
    ],
)
def test_what_cannot_be_read_is_named(mask: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        valid_columns(mask, 4, len(mask) if isinstance(mask, torch.Tensor) else 1)


def test_a_block_mask_is_named(tiny_model: Any) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    model = tiny_model("llama")
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 8, 8, device="cpu")
    with (
        apply(model, OrthoRankConfig(layers=[1])),
        pytest.raises(OrthoRankError, match="attention_mask is a BlockMask"),
    ):
        model(ids_of(1, 8), attention_mask=mask)


def test_a_causal_mask_that_is_not_plain_is_refused(tiny_model: Any) -> None:
    packed = causal(torch.ones(1, 8))
    packed[..., 4:, :4] = False
    prefix = causal(torch.ones(1, 8))
    prefix[..., :4, :4] = True
    sliding = causal(torch.ones(1, 8)).triu(-2)
    for mask in (packed, prefix, sliding, additive(packed)):
        with pytest.raises(OrthoRankError, match="not causal attention with padding"):
            valid_columns(mask, 8, 1)


def test_one_mask_for_all_rows(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = ids_of(3, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.5)), torch.no_grad():
        shared = model(ids, attention_mask=additive(causal(mask)), position_ids=positions).logits
        each = model(ids, attention_mask=mask.expand(3, -1), position_ids=positions).logits
    assert_close(shared[:, 2:], each[:, 2:])


def test_packed_rows_are_refused(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 8)
    restart = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    with apply(model, OrthoRankConfig(layers=[1])), torch.no_grad():
        with pytest.raises(OrthoRankError, match="position_ids restart or jump"):
            model(ids, position_ids=restart, use_cache=False)
        with pytest.raises(OrthoRankError, match="cu_seq_lens_q was given"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 4, 8]))
        model(ids, position_ids=torch.arange(8)[None] + 5, use_cache=False)


def test_a_four_dimensional_mask_gives_what_the_plain_one_gives(tiny_model: Any, family: str) -> None:
    model = tiny_model(family)
    ids = ids_of(3, 5)
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.5)), torch.no_grad():
        plain = model(ids, attention_mask=LEFT, position_ids=positions).logits
        full = model(ids, attention_mask=additive(causal(LEFT)), position_ids=positions).logits
    assert_close(full[LEFT.bool()], plain[LEFT.bool()])


def test_the_cache_is_found_under_either_name() -> None:
    cache = object()
    assert cache_of({"past_key_values": cache}) is cache_of({"cache": cache}) is cache
    assert cache_of({"past_key_values": cache, "cache": None}) is cache
    assert cache_of({}) is None
