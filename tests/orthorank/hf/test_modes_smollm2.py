"""On SmolLM2 with the shipped plan's layers: a thresholded selection is the same however the tokens come."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from orthorank import OrthoRankConfig, apply
from orthorank.calibration.thresholds import calibrate
from orthorank.calls.context import ForwardContext
from orthorank.common.texts import find_text
from orthorank.plans import default_plan
from orthorank.stack.layers import LayerStack

LENGTHS = (25, 14, 19)
Selected = dict[int, set[tuple[int, int]]]  # of each layer: row and position in the row


@pytest.fixture(scope="module")
def rows_and_plan(smollm2: tuple[Any, Any]) -> tuple[list[Tensor], OrthoRankConfig]:
    """Three texts, and thresholds calibrated on another."""
    model, tokenizer = smollm2
    ids = torch.tensor(tokenizer(find_text().content[:8000])["input_ids"])
    plan = calibrate(model, ids[:192].view(2, 96), default_plan(model), decode="threshold", keep_last=0)
    starts = (400, 700, 1000)
    return [ids[start : start + length] for start, length in zip(starts, LENGTHS, strict=True)], plan


def run(model: Any, handle: Any, rows: list[Tensor], sizes: list[int] | None) -> tuple[list[Tensor], Selected]:
    """Logits of each row, and what each layer updated: left-padded rows in chunks of ``sizes``, or without a cache."""
    width = max(map(len, rows))
    ids = torch.stack([torch.cat([torch.zeros(width - len(row), dtype=torch.int64), row]) for row in rows])
    mask = torch.stack([torch.arange(width) >= width - len(row) for row in rows]).long()
    positions, selected = (mask.cumsum(1) - 1).clamp(min=0), defaultdict(set)

    def watch(layer: int, at: Tensor, call: ForwardContext) -> None:
        for row, position in (at >= 0).nonzero().tolist():
            column = call.past + int(at[row, position])
            selected[layer].add((row, column - (width - len(rows[row]))))

    cache = None if sizes is None else DynamicCache(config=model.config)
    logits, end = [], 0
    with handle.watching(watch):
        for size in sizes or [width]:
            begin, end = end, end + size
            here: dict[str, Any] = {"position_ids": positions[:, begin:end]}
            if len(rows) > 1:
                here["attention_mask"] = mask[:, :end]
            logits.append(model(ids[:, begin:end], past_key_values=cache, use_cache=cache is not None, **here).logits)
    whole = torch.cat(logits, dim=1)
    return [whole[i, width - len(row) :] for i, row in enumerate(rows)], dict(selected)


@torch.no_grad()
def smallest_margin(model: Any, rows: list[Tensor], plan: OrthoRankConfig) -> tuple[float, float]:
    """The smallest |score - threshold| of any token in any layer, and as a share of the threshold."""
    stack, margins, shares = LayerStack(model), [], []
    for row in rows:
        inputs = stack.embed(row[None])
        h = inputs.hidden_states
        for layer in range(stack.num_layers):
            options: dict[str, Any] = {}
            if layer in plan.thresholds:
                tau = plan.thresholds[layer]
                margin = float((stack.ranks(layer, h, inputs)[0, 1:] - tau).abs().min())
                margins.append(margin)
                shares.append(margin / tau)
                options = {"select": "threshold", "thresholds": {layer: tau}}
            h = stack.run(layer, h, inputs, plan.ratio(layer), **options)
    return min(margins), min(shares)


def test_any_chunks_any_batch_with_or_without_a_cache(
    smollm2: tuple[Any, Any], rows_and_plan: tuple[list[Tensor], OrthoRankConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    model, (rows, plan) = smollm2[0], rows_and_plan
    margin, share = smallest_margin(model, rows, plan)
    ways: dict[str, list[int] | None] = {
        "a batch without a cache": None,
        "a batch with a cache": [25],
        "a batch token by token": [1] * 25,
        "a batch in chunks of 12, 1, 1, 11": [12, 1, 1, 11],
    }
    worst = 0.0
    with apply(model, plan) as handle, torch.no_grad():
        alone = [run(model, handle, [row], None) for row in rows]
        results = {way: run(model, handle, rows, sizes) for way, sizes in ways.items()}
        first = {f"a row in chunks of {sizes}": run(model, handle, rows[:1], sizes) for sizes in ([1] * 25, [7, 18])}
        achieved = [handle.stats[layer].achieved_ratio for layer in plan.selecting]
    expected = {
        layer: {(row, at) for row, (_, selected) in enumerate(alone) for _, at in selected.get(layer, ())}
        for layer in plan.selecting
    }
    for way, (logits, selected) in (results | first).items():
        rows_here = range(len(logits))
        for layer in plan.selecting:
            assert selected.get(layer, set()) == {pair for pair in expected[layer] if pair[0] in rows_here}, (
                way,
                layer,
            )
        for row in rows_here:
            reference = alone[row][0][0]
            worst = max(worst, float((logits[row] - reference).abs().max() / reference.abs().max()))
    with capsys.disabled():
        print(
            f"\nthe smallest |score - tau| of {sum(LENGTHS)} tokens in {len(plan.selecting)} layers: {margin:.2e}, ",
            end="",
        )
        print(f"{share:.1e} of tau; logits differ by at most {worst:.1e} of their scale; ", end="")
        print(f"updated: {min(achieved):.2f} to {max(achieved):.2f} of the tokens")
    assert worst < 1e-4
    assert all(0 < len(expected[layer]) < sum(LENGTHS) for layer in plan.selecting)


def test_generation_is_greedy_token_by_token(
    smollm2: tuple[Any, Any], rows_and_plan: tuple[list[Tensor], OrthoRankConfig]
) -> None:
    """A batch and prompt lookup, whose calls hold several generated tokens, give the tokens of a row alone."""
    model, (rows, plan) = smollm2[0], rows_and_plan
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with apply(model, plan):
        alone = [model.generate(row[None], **greedy)[0, len(row) :] for row in rows[:2]]
        looked_up = model.generate(rows[0][None], prompt_lookup_num_tokens=3, **greedy)[0, len(rows[0]) :]
        padding = torch.zeros(len(rows[0]) - len(rows[1]), dtype=torch.int64)
        both = torch.stack([rows[0], torch.cat([padding, rows[1]])])
        mask = torch.stack([torch.ones_like(rows[0]), torch.cat([padding, torch.ones_like(rows[1])])])
        together = model.generate(both, attention_mask=mask, **greedy)[:, both.shape[1] :]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(looked_up, alone[0])
