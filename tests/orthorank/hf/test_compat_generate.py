"""Strategies of `generate()` that run the model in other ways than one token at a time, with a plan applied."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from orthorank import OrthoRankConfig, apply
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import WINDOWS, ids_of
from tests.orthorank.models import plain
from tests.orthorank.statement import assert_close

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
PLANS = {
    "topk": PLAN,
    "window": dataclasses.replace(PLAN, select="window", select_window=5),
    "threshold": dataclasses.replace(PLAN, select="threshold", thresholds={1: 5.0, 2: 5.0}),
    "threshold in decoding": dataclasses.replace(
        PLAN, select="threshold", thresholds={1: 5.0, 2: 5.0}, decode="threshold", keep_last=0
    ),
    "removed": dataclasses.replace(PLAN, keep_ratio=0),
}
PLANS |= {f"{name}, corrected": dataclasses.replace(plan, correction=maps([1, 2])) for name, plan in PLANS.items()}
GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def repetitive(tokens: int = 24) -> Tensor:
    """A prompt that repeats itself, so that looking up candidates in it finds some at once."""
    return ids_of(1, 6).repeat(1, tokens // 6)


def candidates_from(kind: str, model: Any) -> dict[str, Any]:
    """Arguments of `generate()` for assisted generation."""
    if kind == "prompt lookup":
        return {"prompt_lookup_num_tokens": 4}
    if kind == "early exit":  # the model's own lower layers, of which the plan has one
        return {"assistant_early_exit": 2}
    # Without a plan the model itself proposes what is often right; another model what is always wrong.
    assistant = plain(model.config.model_type, seed=0 if kind != "another model" else 1)
    if kind == "a model with a plan":
        apply(assistant, OrthoRankConfig(layers=[1], keep_ratio=0.5))
    return {"assistant_model": assistant}


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("plan", sorted(PLANS))
@pytest.mark.parametrize("kind", ["prompt lookup", "early exit", "the model", "another model", "a model with a plan"])
def test_assisted_generation_gives_the_greedy_tokens(kind: str, plan: str, windowed: bool) -> None:
    """Token by token, though the first call of the model holds the prompt and candidates behind it."""
    settings = WINDOWS["qwen2"] if windowed else {}
    model, ids = plain("qwen2", **settings), repetitive()
    if kind == "early exit":
        try:
            model.generate(ids, assistant_early_exit=2, **GREEDY)
        except TypeError:  # transformers 5.16
            pytest.skip("this version of transformers cannot draft with a model's own lower layers")
    first_calls: list[int] = []
    with apply(model, PLANS[plan]) as handle:
        expected = model.generate(ids, **GREEDY)
        greedy_calls = handle.stats[1].calls
        assert plan.startswith("removed") or 9 < handle.stats[1].tokens_updated < handle.stats[1].tokens_in - 4
        hook = model.model.layers[3].register_forward_pre_hook(lambda m, args: first_calls.append(args[0].shape[1]))
        actual = model.generate(ids, **candidates_from(kind, model), **GREEDY)
        hook.remove()
        assert torch.equal(actual, expected)
        assert first_calls[0] > ids.shape[1], "no candidates came with the prompt"
        if kind == "the model" and not plan.startswith("removed"):
            assert handle.stats[1].calls - greedy_calls < greedy_calls, "no candidate was right"


@pytest.mark.parametrize("plan", sorted(PLANS))
def test_beams_of_rows_whose_first_tokens_differ(tiny_model: Any, family: str, plan: str) -> None:
    """Each row of a batch searches as it does alone, and its beams keep the sink of its own first token."""
    model, ids = tiny_model(family), ids_of(3, 17)
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 6}
    with apply(model, PLANS[plan]):
        together = model.generate(ids, return_dict_in_generate=True, **settings)
        sinks: dict[int, Tensor] = getattr(together.past_key_values, "orthorank_sinks", {})
        assert sorted(sinks) == ([] if plan.startswith("removed") else [1, 2])
        for row in range(3):
            alone = model.generate(ids[row : row + 1], return_dict_in_generate=True, **settings)
            assert torch.equal(together.sequences[2 * row : 2 * row + 2], alone.sequences)
            for layer, vectors in sinks.items():
                own = alone.past_key_values.orthorank_sinks[layer]
                assert_close(vectors[3 * row : 3 * row + 3], own)
                others = torch.cat([vectors[: 3 * row], vectors[3 * row + 3 :]])
                assert (others[:, None] - own[None]).abs().amax(-1).min() > 0.01


@torch.no_grad()
def test_later_chunks_of_rows_whose_first_tokens_differ(tiny_model: Any, family: str) -> None:
    """Chunk by chunk in a batch is chunk by chunk alone; rows that begin in the second chunk have their sink there."""
    model, ids, mask = tiny_model(family), ids_of(3, 18), torch.ones(3, 18, dtype=torch.long)
    mask[1, :9] = 0
    mask[2, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, together = DynamicCache(config=model.config), []
    with apply(model, PLAN):
        for begin, end in ((0, 7), (7, 12), (12, 18)):
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, begin:end]}
            together.append(model(ids[:, begin:end], past_key_values=cache, **part).logits)
        for row, start in enumerate((0, 9, 4)):
            own = DynamicCache(config=model.config)
            for (begin, end), logits in zip(((0, 7), (7, 12), (12, 18)), together, strict=True):
                if end > start:
                    chunk = ids[row : row + 1, max(begin, start) : end]
                    expected = model(chunk, past_key_values=own).logits
                    assert_close(logits[row : row + 1, max(begin, start) - begin :], expected)


@torch.no_grad()
@pytest.mark.parametrize("plan", sorted(PLANS))
def test_a_cache_that_is_cropped(tiny_model: Any, plan: str) -> None:
    """Generated tokens that were taken back are as if they had never been; so are chunks of the prompt."""
    model, ids, more = tiny_model("llama"), ids_of(2, 12), ids_of(2, 7, seed=3)
    with apply(model, PLANS[plan]) as handle:
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        plain = copy.deepcopy(cache)
        for _ in range(3):
            model(ids_of(2, 1, seed=9), past_key_values=cache)
        cache.crop(-3)
        expected = model(more, past_key_values=plain).logits
        assert torch.equal(model(more, past_key_values=cache).logits, expected)
        cache.crop(-7)
        assert torch.equal(model(more, past_key_values=cache).logits, expected)
        with handle.decoding():
            cache.crop(-2)
            plain.crop(-2)
            dense = model(more, past_key_values=plain).logits
            assert torch.equal(model(more, past_key_values=cache).logits, dense)


@torch.no_grad()
@pytest.mark.parametrize("plan", ["topk", "window", "removed", "topk, corrected", "removed, corrected"])
def test_rows_of_a_cache_in_any_order(tiny_model: Any, plan: str) -> None:
    """Repeated, picked and reordered one after the other: the rows go on as those of a cache that was filled so."""
    model, ids, more = tiny_model("llama"), ids_of(3, 12), ids_of(4, 9, seed=4)
    rows = torch.arange(3).repeat_interleave(2)[torch.tensor([5, 0, 3, 2])][torch.tensor([1, 3, 0, 2])]
    with apply(model, PLANS[plan]):
        cache, own = DynamicCache(config=model.config), DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([5, 0, 3, 2]))
        cache.reorder_cache(torch.tensor([1, 3, 0, 2]))
        model(ids[rows], past_key_values=own)
        for tokens in (9, 1):
            expected = model(more[:, :tokens], past_key_values=own).logits
            assert_close(model(more[:, :tokens], past_key_values=cache).logits, expected)
