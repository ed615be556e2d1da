"""Kinds of caches: quantised ones, and ones that keep their layers on the CPU while they are not needed."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from orthorank import OrthoRankConfig, apply
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny

GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PLANS = {
    "selecting": OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3),
    "removed": OrthoRankConfig(layers=[1, 2], keep_ratio=0),
    "first and last removed": OrthoRankConfig(layers=[0, 3], keep_ratio=0),
    "corrected": OrthoRankConfig(layers=[0, 1, 2], keep_ratios={0: 0, 1: 0.5, 2: 0}, correction=maps([0, 1, 2])),
}
BACKENDS: dict[str, dict[str, Any]] = {
    "fp8": {},
    "quanto": {"q_group_size": 16, "residual_length": 8},
    "hqq": {"q_group_size": 16, "residual_length": 8, "axis_key": 1, "axis_value": 1},
}


def quantised(model: Any, backend: str) -> Any:
    """An empty quantised cache for ``model``."""
    if backend != "fp8":
        pytest.importorskip({"quanto": "optimum.quanto", "hqq": "hqq.core.quantize"}[backend])
    elif "fp8" not in str(QuantizedCache.__doc__):
        pytest.skip("this version of transformers has no fp8 cache")
    return QuantizedCache(backend, model.config, **BACKENDS[backend])


@torch.no_grad()
def check_quantised(backend: str, plan: OrthoRankConfig) -> None:
    """The cache holds the plan's keys and values, quantised: filled with the exact ones, it goes on in the same way."""
    model, ids = tiny("llama-3"), ids_of(2, 20)
    exact, cache, filled = DynamicCache(config=model.config), quantised(model, backend), quantised(model, backend)
    with apply(model, plan):
        prefilled = [model(ids, past_key_values=each).logits for each in (exact, cache)]
        assert torch.equal(*prefilled), "attention to the prompt itself is exact"
        for index, layer in enumerate(exact.layers):
            if layer.is_initialized:
                # a removed layer keeps a count alone, in one channel, which is less than can be quantised
                channels = max(layer.keys.shape[-1], BACKENDS[backend].get("q_group_size", 1))
                filled.update(*(x.expand(-1, -1, -1, channels) for x in (layer.keys, layer.values)), index)
        for name in ("orthorank_sinks", "orthorank_plan"):
            if hasattr(exact, name):
                setattr(filled, name, copy.copy(getattr(exact, name)))
        differs = False
        for tokens in (1, 1, 7, 1):
            logits = [
                model(ids_of(2, tokens, seed=tokens), past_key_values=each).logits for each in (exact, cache, filled)
            ]
            assert torch.equal(logits[1], logits[2])
            differs = differs or not torch.equal(logits[0], logits[1])
        assert differs, "nothing was quantised"
        out = model.generate(ids, past_key_values=quantised(model, backend), **GREEDY)
        by_name = {"cache_implementation": "quantized", "cache_config": {"backend": backend} | BACKENDS[backend]}
        assert torch.equal(model.generate(ids, **by_name, **GREEDY), out)


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_quantised_cache(plan: str) -> None:
    check_quantised("fp8", PLANS[plan])


@pytest.mark.slow  # they compile extensions when they are first used; and importing hqq slows transformers
@pytest.mark.parametrize("plan", sorted(PLANS))
@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_quantised_caches_of_other_packages(backend: str, plan: str) -> None:
    check_quantised(backend, PLANS[plan])


class Stream:
    """Stands for a CUDA stream, which a machine without a GPU lacks: everything happens in order anyway."""

    def wait_stream(self, other: "Stream") -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *args: object) -> None: ...


@pytest.fixture
def far_away(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Offloading as on a GPU: an offloaded layer of a cache cannot be used until it is fetched. Lists the fetches."""
    fetched: list[int] = []

    def offload(layer: Any) -> None:
        if layer.is_initialized and not hasattr(layer, "away"):
            layer.away = layer.keys, layer.values
            layer.keys, layer.values = (x.to("meta") for x in layer.away)  # any use of both fails

    def prefetch(layer: Any) -> None:
        if hasattr(layer, "away"):
            layer.keys, layer.values = layer.away
            del layer.away
            fetched.append(id(layer))

    for kind in (DynamicLayer, StaticLayer):
        monkeypatch.setattr(kind, "offload", offload)
        monkeypatch.setattr(kind, "prefetch", prefetch)
    monkeypatch.setattr(torch, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: Stream())
    return fetched


@pytest.mark.parametrize("plan", sorted(PLANS))
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_an_offloading_cache(far_away: list[int], kind: str, plan: str) -> None:
    """Every layer is fetched when the one before it is updated, so a removed layer must be updated, too."""
    model, ids = tiny("llama-3"), ids_of(2, 20)

    def cache(offloading: bool) -> Any:
        if kind == "static":
            return StaticCache(model.config, max_cache_len=40, offloading=offloading)
        return DynamicCache(config=model.config, offloading=offloading)

    with apply(model, PLANS[plan]), torch.no_grad():
        results: list[list[Tensor]] = []
        for offloading in (False, True):
            given = cache(offloading)
            results.append([model.generate(ids, past_key_values=given, **GREEDY)])
            results[-1] += [model(ids_of(2, n, seed=n), past_key_values=given).logits for n in (7, 1, 1)]
    assert len(far_away) > 3 * 6
    for plain, offloaded in zip(*results, strict=True):
        assert torch.equal(plain, offloaded)
