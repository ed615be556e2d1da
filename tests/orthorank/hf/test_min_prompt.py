"""`min_prompt`: rows whose prompts are too short pass every layer that is not removed, alone and beside longer ones."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import orthorank
from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.statement import assert_close

LAYERS, MIN = [1, 2], 16
LENGTHS = [15, 20, 16, 1]
PLANS: dict[str, dict[str, Any]] = {
    "topk": {},
    "sink updated": {"update_sink": True},
    "window": {"select": "window", "select_window": 6},
    "threshold": {"select": "threshold", "thresholds": dict.fromkeys(LAYERS, 12.0)},
    "corrected": {"keep_ratios": {2: 0}, "correction": maps(LAYERS)},
    "map of a selecting layer": {"correction": maps([1])},
}
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def plan(name: str, **fields: Any) -> OrthoRankConfig:
    return OrthoRankConfig(**({"layers": LAYERS, "keep_ratio": 0.4, "min_prompt": MIN} | PLANS[name] | fields))


def ids_of(tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (1, tokens), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(row.shape[1] for row in rows)
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        held = slice(width - row.shape[1], width) if side == "left" else slice(0, row.shape[1])
        ids[number, held], mask[number, held] = row[0], 1
    return ids, mask


def alone(model: Any, name: str, row: Tensor) -> Tensor:
    """The row by the plan without the field, or with its selecting layers dense."""
    without = plan(name, min_prompt=0)
    if row.shape[1] < MIN:
        ratios = {layer: 1.0 if ratio else 0.0 for layer, ratio in without.ratios.items()}
        left = {} if without.correction is None else without.correction.maps
        left = {layer: each for layer, each in left.items() if not ratios[layer]}
        kept = Correction(left) if left else None
        without = dataclasses.replace(
            without, keep_ratios=ratios, thresholds={}, select="topk", select_window=None, correction=kept
        )
    with apply(model, without):
        return model(row).logits[0]


@torch.no_grad()
@pytest.mark.parametrize("name", PLANS)
def test_each_row_of_a_batch_is_what_it_is_alone(tiny_model: Any, name: str) -> None:
    model, rows = tiny_model("llama"), [ids_of(length, seed) for seed, length in enumerate(LENGTHS)]
    wanted = [alone(model, name, row) for row in rows]
    with apply(model, plan(name)) as handle:
        for side in ("left", "right"):
            ids, mask = padded(rows, side)
            found = model(ids, attention_mask=mask).logits
            for number in range(len(rows)):
                assert_close(found[number][mask[number].bool()], wanted[number])
        assert handle.stats[1].tokens_generated == 2 * sum(length for length in LENGTHS if length < MIN)
        assert_close(model(rows[0]).logits[0], wanted[0])


@torch.no_grad()
@pytest.mark.parametrize("name", ["topk", "window", "corrected"])
def test_generate_knows_the_whole_prompt_before_its_first_chunk(tiny_model: Any, name: str) -> None:
    """Alone, in a batch, in chunks shorter than the least prompt; and over a cache, where the second turn is longer."""
    model, rows = tiny_model("llama"), [ids_of(10, 1), ids_of(20, 2)]
    chunk = 6 if name == "window" else None  # where chunks end at windows, they do not matter
    with apply(model, plan(name, min_prompt=0)) as handle:
        with handle.decoding():
            short = model.generate(rows[0], **GREEDY)
        long = model.generate(rows[1], **GREEDY)
    ids, mask = padded(rows, "left")
    with apply(model, plan(name)) as handle:
        assert model.generate(rows[0], **GREEDY).tolist() == short.tolist()
        assert handle.stats[1].tokens_in == handle.stats[1].tokens_generated
        assert model.generate(rows[1], **GREEDY, prefill_chunk_size=chunk).tolist() == long.tolist()
        both = model.generate(ids, attention_mask=mask, **GREEDY)
        assert both[:, 20:].tolist() == [short[0, 10:].tolist(), long[0, 20:].tolist()]
        cache = DynamicCache(config=model.config)
        first = model.generate(rows[0], past_key_values=cache, **GREEDY)
        before = handle.stats[1].tokens_in - handle.stats[1].tokens_generated
        model.generate(torch.cat([first, ids_of(12, 3)], 1), past_key_values=cache, **GREEDY)
        assert handle.stats[1].tokens_in - handle.stats[1].tokens_generated - before == 1 + 12


@torch.no_grad()
def test_plain_calls_are_judged_by_their_tokens_so_far(tiny_model: Any) -> None:
    """A row that becomes long enough is selected from, by the sink of its first call; padding counts nowhere."""
    model, cache = tiny_model("llama"), DynamicCache()
    row = ids_of(20, 4)
    seen: list[Tensor] = []
    hook = model.model.layers[2].input_layernorm.register_forward_hook(lambda m, given, out: seen.append(out))
    with apply(model, plan("topk")) as handle:
        model(row[:, :8], past_key_values=cache)
        assert_close(cache.orthorank_sinks[2], next(each for each in seen if each.dim() == 3)[:, 0])
        model(row[:, 8:], past_key_values=cache)
        assert [handle.stats[1].tokens_in, handle.stats[1].tokens_generated] == [20, 8]
        late = DynamicCache()
        mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 20)], 1).long()
        ids = torch.cat([torch.zeros(1, 9).long(), row], 1)
        for begin, end in ((0, 8), (8, 17), (17, 29)):  # nothing of the row, eight tokens, the others
            model(ids[:, begin:end], attention_mask=mask[:, :end], past_key_values=late)
        assert_close(late.orthorank_sinks[2], cache.orthorank_sinks[2])
        for ours, others in zip(late.layers, cache.layers, strict=True):
            assert_close(ours.values[:, :, 9:], others.values)
    hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[5, 20], [5, 7], [20, 18]])
def test_contexts_are_judged_by_what_they_are_said_to_be(tiny_model: Any, lengths: list[int]) -> None:
    model, ids = tiny_model("llama"), torch.cat([ids_of(24, 5), ids_of(24, 6)])
    wanted = []
    for row, length in zip(ids, lengths, strict=True):
        with apply(model, plan("topk", min_prompt=0)) as handle:
            inside = orthorank.context(model, length) if length >= MIN else handle.decoding()
            with inside:
                wanted.append(model(row[None]).logits[0])
    with apply(model, plan("topk")):
        with orthorank.context(model, lengths):
            assert_close(model(ids).logits, torch.stack(wanted))
            cache = DynamicCache()
            first = model(ids[:, :4], past_key_values=cache).logits  # shorter than any, and part of a longer one
        if min(lengths) < MIN:
            assert_close(first[lengths.index(min(lengths))], wanted[lengths.index(min(lengths))][:4])


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"min_prompt": -1}, "min_prompt is -1; it must be an integer, 0 or more"),
        ({"min_prompt": True}, "min_prompt is True"),
        ({"min_prompt": 8, "kv": "selected"}, "min_prompt is 8 and kv is 'selected'"),
        (
            {"min_prompt": 8, "select": "threshold", "thresholds": {1: 1.0}, "decode": "threshold"},
            "min_prompt is 8 and decode is 'threshold'",
        ),
    ],
)
def test_what_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(OrthoRankError, match=said):
        OrthoRankConfig(layers=[1], **fields)
