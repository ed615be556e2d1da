"""Caches that outlive a call: later chunks, second turns, rows that move, and caches that cannot be continued."""

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_layer import WINDOWS, ids_of
from tests.orthorank.statement import assert_close

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def test_a_multi_token_call_on_a_filled_cache(tiny_model: Any, plan: OrthoRankConfig) -> None:
    """Outside generate() it is a prefill chunk, unless `decoding()` says otherwise; one token is a decode step."""
    model = tiny_model("llama")
    ids = ids_of(1, 24)
    counts = []
    with apply(model, plan) as handle, torch.no_grad():
        for decoding in (False, True):
            cache = DynamicCache()
            model(ids[:, :12], past_key_values=cache)
            before = handle.stats[1].tokens_updated
            if decoding:
                with handle.decoding():
                    model(ids[:, 12:], past_key_values=cache)
            else:
                model(ids[:, 12:], past_key_values=cache)
            counts.append(handle.stats[1].tokens_updated - before)
            model(ids[:, :1], past_key_values=cache)
            assert handle.stats[1].tokens_updated - before == counts[-1] + 1
    assert counts == [4, 12]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_later_chunks_use_the_stored_sink(tiny_model: Any, family: str, kind: str) -> None:
    """A chunk's selection is by the sink of the row, which is not in the chunk: checked against a direct statement."""
    model = tiny_model(family)
    ids = ids_of(1, 24)
    cache = DynamicCache(config=model.config) if kind == "dynamic" else StaticCache(model.config, max_cache_len=40)
    seen: list[torch.Tensor] = []
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=1 / 3)), torch.no_grad():
        hook = model.model.layers[1].register_forward_hook(lambda m, a, out: seen.extend([a[0], out]))
        model(ids[:, :12], past_key_values=cache)
        model(ids[:, 12:], past_key_values=cache)
        hook.remove()
    norm = model.model.layers[1].input_layernorm
    sink, chunk = norm(seen[0])[0, 0], norm(seen[2])[0]
    expected = sorted((chunk @ sink).abs().argsort()[:4].tolist())
    changed = (seen[2] != seen[3]).any(dim=-1)[0].nonzero().flatten().tolist()
    assert changed == expected


@pytest.mark.parametrize("kind", ["reorder_cache", "batch_repeat_interleave", "batch_select_indices"])
def test_the_sinks_follow_the_rows_of_the_cache(tiny_model: Any, kind: str, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    ids, more = ids_of(3, 12), ids_of(3, 9, seed=4)
    argument = {
        "reorder_cache": torch.tensor([2, 0, 1]),
        "batch_repeat_interleave": 2,
        "batch_select_indices": torch.tensor([2, 1]),
    }[kind]
    rows = torch.arange(3).repeat_interleave(2) if kind == "batch_repeat_interleave" else argument
    with apply(model, plan), torch.no_grad():
        caches = [DynamicCache(), DynamicCache()]
        model(ids, past_key_values=caches[0])
        getattr(copy.deepcopy(caches[0]), kind)(argument)  # a copy of its own: the original stays as it is
        getattr(caches[0], kind)(argument)
        model(ids[rows], past_key_values=caches[1])
        moved, own = (model(more[rows], past_key_values=cache).logits for cache in caches)
    assert_close(moved, own)


def test_generating_densely_over_a_dense_cache(tiny_model: Any, plan: OrthoRankConfig) -> None:
    """What the refusal of a dense cache advises works."""
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    with torch.no_grad():
        expected = model.generate(ids, **GREEDY)
        cache = DynamicCache()
        model(ids[:, :6], past_key_values=cache)
        with apply(model, plan) as handle, handle.decoding():
            assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), expected)


@pytest.mark.parametrize("windowed", [False, True])
def test_a_second_turn_over_the_first_ones_cache(
    tiny_model: Any, family: str, windowed: bool, plan: OrthoRankConfig
) -> None:
    """The new tokens are a prefill chunk with the row's own sink; what was generated before stays as it is."""
    model = tiny_model(family, **(WINDOWS[family] if windowed else {}))
    ids, more = ids_of(1, 19), ids_of(1, 9, seed=5)
    with apply(model, plan) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config)
        turn = model.generate(ids, past_key_values=cache, **GREEDY)
        both = torch.cat([turn, more], 1)
        before = handle.stats[1].tokens_updated
        actual = model.generate(both, past_key_values=cache, **(GREEDY | {"max_new_tokens": 1}))
        assert handle.stats[1].tokens_updated - before == 3, "ten tokens were not cached: a third of them"

        by_hand = DynamicCache(config=model.config)
        with handle.prefilling():
            model(ids, past_key_values=by_hand)
        with handle.decoding():
            model(turn[:, 19:-1], past_key_values=by_hand)
        with handle.prefilling():
            expected = model(both[:, turn.shape[1] - 1 :], past_key_values=by_hand).logits[:, -1].argmax(-1)
    assert torch.equal(actual[:, -1], expected)


def test_a_dense_cache_cannot_be_continued(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    ids = ids_of(2, 12)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with apply(model, plan) as handle:
            with pytest.raises(OrthoRankError, match="the cache was filled without a plan"):
                model(ids, past_key_values=cache)
            with handle.decoding():
                model(ids, past_key_values=cache)
