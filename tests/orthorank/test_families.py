"""Every family: the identities, and the selected layer against the rows of the family's own dense layer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import FAMILIES, OrthoRankConfig, apply
from tests.orthorank.dense_rows import DenseRows, call
from tests.orthorank.naive import assert_close, without_layers
from tests.orthorank.test_layer import ids_of
from tests.orthorank.tiny import MODELS, has_windows, tiny

LENGTHS = (33, 20, 1, 2)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def padded(side: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[rows, longest]``."""
    ids, longest = ids_of(len(lengths), max(lengths)), max(lengths)
    column, size = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = (column >= longest - size) if side == "left" else (column < size)
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Each model of the table in turn."""
    return request.param


def test_every_family_has_a_model_and_windows_where_it_has_them() -> None:
    assert {model.model_type for model in MODELS.values()} == set(FAMILIES)
    windowed = {model.model_type for name, model in MODELS.items() if has_windows(tiny(name))}
    everything = {"llama", "gemma", "olmo2", "granite", "stablelm", "cohere"}
    assert windowed == set(FAMILIES) - everything


# Gemma 2 caps scores, which sdpa does not do: transformers refuses the two together.
ATTENTIONS = [
    (name, attention)
    for name, model in MODELS.items()
    for attention in ("sdpa", "eager")
    if (model.model_type, attention) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_a_padded_batch(name: str, attention: str, side: str) -> None:
    """Each row against the dense layer's own rows; every token selected against the dense model."""
    model = tiny(name, attention=attention)
    ids, mask = padded(side)
    real = mask.bool()
    with DenseRows(model, [0, 1, 2], 0.4) as rows:
        expected = rows(ids, mask)[real]
    dense = call(model, ids, mask)[real]
    with apply(model, OrthoRankConfig(layers=[0, 1, 2], keep_ratio=0.4)) as handle:
        assert_close(call(model, ids, mask)[real], expected)
        assert [handle.stats[i].tokens_updated for i in range(3)] == [13 + 8 + 0 + 0] * 3
    with apply(model, OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1 - 1e-9)):
        assert_close(call(model, ids, mask)[real], dense)
    with apply(model, OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1)):
        assert torch.equal(call(model, ids, mask)[real], dense)
    assert (expected - dense).abs().max() > 0.05 * dense.abs().max(), "the plan must change something"


def _caches(model: Any) -> dict[str, Any]:
    from transformers import DynamicCache, StaticCache

    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=48)}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_and_decoding_over_a_cache(name: str, kind: str) -> None:
    """Two chunks of a left-padded prompt, of which one row begins in the second, and tokens after it."""
    model = tiny(name)
    ids, mask = padded("left", (33, 20, 9))
    more = ids_of(3, 3, seed=1)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    steps = [(0, 22), (22, 33), (33, 34), (34, 35), (35, 36)]
    with DenseRows(model, [0, 1, 2], 0.4) as rows:
        cache = _caches(model)[kind]
        expected = [rows(ids[:, a:b], mask[:, :b], cache, dense=b - a == 1) for a, b in steps]
    cache = _caches(model)[kind]
    with apply(model, OrthoRankConfig(layers=[0, 1, 2], keep_ratio=0.4)):
        for (a, b), logits in zip(steps, expected, strict=True):
            real = mask[:, a:b].bool()
            assert_close(call(model, ids[:, a:b], mask[:, :b], cache)[real], logits[real])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(name: str, cache: str | None) -> None:
    model = tiny(name)
    ids, mask = padded("left", (19, 12))
    given, seen = ids, mask
    with DenseRows(model, [1, 2], 0.4, keep_last=1) as rows:
        dynamic = _caches(model)["dynamic"]
        logits = rows(ids, mask, dynamic)
        for _ in range(6):
            token = logits[:, -1:].argmax(-1)
            given, seen = torch.cat([given, token], 1), torch.cat([seen, torch.ones_like(token)], 1)
            logits = rows(token, seen, dynamic, dense=True)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)):
        settings = GREEDY if cache is None else GREEDY | {"cache_implementation": cache}
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, **settings), given)


REMOVED = [[0], [1, 2]]


@pytest.mark.parametrize(
    "layers", [*REMOVED, *(pytest.param(others, marks=pytest.mark.slow) for others in ([0, 1], [0, 3], [2, 3], [3]))]
)
def test_ratio_zero_removes_the_layer(name: str, layers: list[int]) -> None:
    """Also where masks read how many tokens are cached from the removed layer: the first of its kind."""
    model = tiny(name)
    pruned = without_layers(model, layers)
    ids, mask = padded("left", (17, 12))
    real = mask.bool()
    logits = call(pruned, ids, mask)[real]
    tokens = pruned.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    with apply(model, OrthoRankConfig(layers=layers, keep_ratio=0)) as handle:
        assert_close(call(model, ids, mask)[real], logits)
        cache = _caches(model)["dynamic"]
        halves = [call(model, ids[:, a:b], mask[:, :b], cache) for a, b in ((0, 11), (11, 17))]
        assert_close(torch.cat(halves, 1)[real], logits)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY), tokens)
        static = {"cache_implementation": "static", "max_new_tokens": 6}
        assert torch.equal(model.generate(ids, attention_mask=mask, **static, **GREEDY), tokens)
        assert handle.stats[layers[0]].tokens_updated == 0
