"""Caches that the user passes: what another plan, or none, has filled is not continued without a word."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.hf.cache_state import identity
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.statement import assert_close

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OTHERS = {
    "layers": ({"layers": [1, 3]}, "its keep ratio by layer is"),
    "keep_ratio": ({"keep_ratio": 0.5}, "its keep ratio by layer is"),
    "one layer's ratio": ({"keep_ratios": {2: 0.5}}, "its keep ratio by layer is"),
    "removed": ({"keep_ratio": 0}, "its keep ratio by layer is"),
    "criterion": ({"criterion": "inverse"}, "its criterion is inverse, and that of the one applied now orthogonal"),
    "window": ({"select": "window", "select_window": 4}, "its select is window"),
    "keep_multiple": ({"keep_multiple": 3}, "its keep_multiple is 3, and that of the one applied now 1"),
    "update_sink": ({"update_sink": True}, "its update_sink is True, and that of the one applied now False"),
    "sinks": ({"sinks": "auto"}, "its sinks is auto"),
    "threshold": ({"select": "threshold", "thresholds": {1: 0.1, 2: 0.2}}, "its select is threshold"),
    "correction": ({"correction": maps([1, 2])}, "its correction is"),
}


@torch.no_grad()
def fill(model: Any, plan: OrthoRankConfig | None, cache: Any = None) -> Any:
    """A cache of twelve tokens of two rows, filled by ``plan``, or densely."""
    cache = DynamicCache() if cache is None else cache
    if plan is None:
        model(ids_of(2, 12), past_key_values=cache)
    else:
        with apply(model, plan):
            model(ids_of(2, 12), past_key_values=cache)
    return cache


def one_token(model: Any, cache: Any) -> None:
    model(ids_of(2, 1), past_key_values=cache)


def a_chunk(model: Any, cache: Any) -> None:
    model(ids_of(2, 5), past_key_values=cache)


def a_generation(model: Any, cache: Any) -> None:
    model.generate(torch.cat([ids_of(2, 12), ids_of(2, 5, seed=1)], 1), past_key_values=cache, **GREEDY)


@torch.no_grad()
@pytest.mark.parametrize("proceed", [one_token, a_chunk, a_generation])
@pytest.mark.parametrize("kind", ["dense", *OTHERS])
def test_a_cache_of_another_plan_is_refused(tiny_model: Any, kind: str, proceed: Callable[[Any, Any], None]) -> None:
    """Whichever way it goes on, and before any layer has run: the cache stays as it was."""
    model = tiny_model("llama")
    words = "the cache was filled without a plan"
    plan = None
    if kind != "dense":
        plan = dataclasses.replace(PLAN, **OTHERS[kind][0])
        words = f"the cache was filled by another plan: {OTHERS[kind][1]}"
    cache = fill(model, plan)
    with apply(model, PLAN), pytest.raises(OrthoRankError, match=words):
        proceed(model, cache)
    assert cache.get_seq_length() == 12
    assert len({layer.get_seq_length() for layer in cache.layers if layer.get_seq_length()}) == 1


@torch.no_grad()
def test_what_the_error_advises_works(tiny_model: Any) -> None:
    """Inside `decoding()` any cache goes on, one token, a chunk, or `generate()`, as the dense model would."""
    model = tiny_model("llama")
    for plan in (None, dataclasses.replace(PLAN, keep_ratio=0.5)):
        cache = fill(model, plan)
        expected = model(ids_of(2, 5), past_key_values=copy.deepcopy(cache)).logits
        with apply(model, PLAN) as handle, handle.decoding():
            proceeded = copy.deepcopy(cache)
            assert torch.equal(model(ids_of(2, 5), past_key_values=proceeded).logits, expected)
            one_token(model, proceeded)
            a_generation(model, cache)


@torch.no_grad()
def test_the_same_plan_goes_on(tiny_model: Any) -> None:
    """Also where it says the same otherwise, on a copy of the cache, with another ``keep_last``, in another model."""
    model, other = tiny_model("llama"), tiny_model("llama")
    cache = fill(model, PLAN)
    same = OrthoRankConfig(
        layers=[1, 2, 3], keep_ratio=0.9, keep_ratios={1: 1 / 3, 2: 1 / 3, 3: 1}, seed=7, keep_last=3, model_id="a/b"
    )
    with apply(model, PLAN), apply(other, same):
        for proceed in (one_token, a_chunk, a_generation):
            for way in (model, other):
                proceed(way, copy.deepcopy(cache))


@torch.no_grad()
def test_a_cache_of_a_plan_is_refused_by_a_plan_that_leaves_all_dense(tiny_model: Any) -> None:
    model = tiny_model("llama")
    cache, dense = fill(model, PLAN), fill(model, None)
    with apply(model, dataclasses.replace(PLAN, keep_ratio=1)):
        one_token(model, dense)
        with pytest.raises(OrthoRankError, match="filled by a plan, and the one applied now leaves every layer dense"):
            one_token(model, cache)


@torch.no_grad()
def test_removed_layers_are_seen(tiny_model: Any) -> None:
    """A plan of removed layers keeps no sinks; its caches are told from dense ones all the same."""
    model, pruned = tiny_model("llama"), dataclasses.replace(PLAN, keep_ratio=0)
    with apply(model, pruned), pytest.raises(OrthoRankError, match="the cache was filled without a plan"):
        a_chunk(model, fill_dense := fill(tiny_model("llama"), None))
    assert fill_dense.get_seq_length() == 12
    cache = fill(model, pruned)
    with apply(model, pruned):
        a_chunk(model, cache)


@torch.no_grad()
def test_a_prompt_that_was_decoded_is_no_prompt_of_the_plan(tiny_model: Any) -> None:
    model = tiny_model("llama")
    cache = DynamicCache()
    with apply(model, PLAN) as handle:
        with handle.decoding():
            model(ids_of(2, 12), past_key_values=cache)
        with pytest.raises(OrthoRankError, match=r"without a plan \(by the dense model, or inside `with handle\.decod"):
            a_chunk(model, cache)


@torch.no_grad()
def test_a_cache_that_was_emptied_begins_anew(tiny_model: Any) -> None:
    """A static cache after ``reset()``, and one that was cropped to nothing, belong to whoever fills them next."""
    model = tiny_model("llama")
    half = dataclasses.replace(PLAN, keep_ratio=0.5)
    for cache in (StaticCache(model.config, max_cache_len=40), DynamicCache()):
        fill(model, half, cache)
        if isinstance(cache, StaticCache):
            cache.reset()
        else:
            cache.crop(-12)
        fresh = type(cache)(model.config, max_cache_len=40) if isinstance(cache, StaticCache) else DynamicCache()
        with apply(model, PLAN):
            for each in (cache, fresh):
                model(ids_of(2, 12), past_key_values=each)
            again, first = (model(ids_of(2, 5), past_key_values=each).logits for each in (cache, fresh))
            assert_close(again, first)


def test_the_identity_of_a_plan_is_what_its_caches_depend_on() -> None:
    assert identity(OrthoRankConfig(layers=[])) == identity(OrthoRankConfig(layers=[1], keep_ratio=1)) == ""
    assert identity(PLAN) == identity(dataclasses.replace(PLAN, keep_last=0, seed=3, measured={"loss": 1.0}))
    random = dataclasses.replace(PLAN, criterion="random")
    assert identity(random) != identity(dataclasses.replace(random, seed=3))
    different = [identity(dataclasses.replace(PLAN, **fields)) for fields, _ in OTHERS.values()]
    assert len({*different, identity(PLAN)}) == len(OTHERS) + 1
