"""Context-only selection: as `generate()` has it, a prefill of the context and then dense steps over its cache."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import orthorank
from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.statement import assert_close

LAYERS, TOKENS = [1, 2], 22
PLANS: dict[str, dict[str, Any]] = {
    "topk": {},
    "inverse": {"criterion": "inverse"},
    "sink updated": {"update_sink": True},
    "window": {"select": "window", "select_window": 5},
    "threshold": {"select": "threshold", "thresholds": dict.fromkeys(LAYERS, 12.0)},
    "removed": {"keep_ratios": {2: 0}},
    "corrected": {"keep_ratios": {2: 0}, "correction": maps(LAYERS)},
}


def plan(name: str) -> OrthoRankConfig:
    return OrthoRankConfig(**({"layers": LAYERS, "keep_ratio": 0.4} | PLANS[name]))


def ids_of(rows: int, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def stepwise(model: Any, row: Tensor, ends: list[int], keep: int | None) -> Tensor:
    """Logits ``[tokens, vocabulary]``: the context in calls up to each of ``ends``, then one token at a time.

    Where the context ends, ``keep`` of its tokens are forced (None: the plan's); of a shorter row it does not end.
    """
    cache, logits = DynamicCache(config=model.config), []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        if len(row[begin:end]):
            last = end == ends[-1] and end <= len(row)
            with orthorank.handle_of(model).prefilling(keep) if last else nullcontext():
                logits.append(model(row[None, begin:end], past_key_values=cache).logits[0])
    logits += [model(ids[None], past_key_values=cache).logits[0] for ids in row[ends[-1] :].split(1) if len(ids)]
    return torch.cat(logits)


@pytest.mark.parametrize("keep", [None, 0, 3])
@pytest.mark.parametrize("name", PLANS)
def test_equals_a_prefill_and_dense_steps(tiny_model: Any, family: str, name: str, keep: int | None) -> None:
    model, ids, lengths = tiny_model(family), ids_of(3, seed=1), [15, 1, 21]
    with apply(model, plan(name)) as handle, torch.no_grad():
        expected = [stepwise(model, row, [length], keep) for row, length in zip(ids, lengths, strict=True)]
        counted = [handle.stats[layer].tokens_updated for layer in LAYERS]
        with orthorank.context(model, lengths, keep):
            assert_close(model(ids, use_cache=False).logits, torch.stack(expected))
        assert [handle.stats[layer].tokens_updated for layer in LAYERS] == [2 * count for count in counted]
        with orthorank.context(model, 15, keep):
            assert_close(model(ids[:1]).logits[0], expected[0])
        free = model(ids[:1]).logits[0]
    assert (free - expected[0]).abs().max() > 1e-3 or name in ("threshold", "removed"), "it must matter where it ends"


def test_log_probabilities_of_generated_tokens_are_those_of_generate(tiny_model: Any, family: str) -> None:
    """What a trainer on rollouts computes: a plain forward and ``keep_last=0`` give other ones."""
    model, prompts = tiny_model(family), ids_of(2, 14, seed=7)
    with apply(model, OrthoRankConfig(layers=LAYERS, keep_ratio=0.25, keep_last=2)), torch.no_grad():
        rollout = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=6,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
            pad_token_id=0,
        )
        wanted = torch.stack(rollout.logits, dim=1)
        with orthorank.context(model, prompts.shape[1]):
            assert_close(model(rollout.sequences).logits[:, 13:-1], wanted)
        with orthorank.context(model, prompts.shape[1], keep_last=0):
            unforced = model(rollout.sequences).logits[:, 13:-1]
        plain = model(rollout.sequences).logits[:, 13:-1]
    assert (unforced - wanted).abs().max() > 1e-3
    assert (plain - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("name", ["topk", "window", "threshold", "corrected"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(tiny_model: Any, family: str, name: str, side: str, keep: int | None) -> None:
    model, ids, lengths = tiny_model(family), ids_of(4, seed=2), [15, 4, 7, 30]
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 6, 11, 3)):
        mask[row, slice(0, padding) if side == "left" else slice(TOKENS - padding, TOKENS)] = 0
    rows = [ids[i, mask[i] == 1] for i in range(4)]
    with apply(model, plan(name)), torch.no_grad():
        expected = [stepwise(model, row, [length], keep) for row, length in zip(rows, lengths, strict=True)]
        extra = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        with orthorank.context(model, torch.tensor(lengths), keep):
            logits = model(ids, **extra).logits
        assert_close(logits[mask == 1], torch.cat(expected))


@pytest.mark.parametrize("keep", [0, 1, 2])
@pytest.mark.parametrize("lengths", [[14, 10], [14, 14], [5, 12], [15, 5]])
@pytest.mark.parametrize("name", ["topk", "window", "sink updated", "corrected"])
def test_chunks(tiny_model: Any, name: str, lengths: list[int], keep: int) -> None:
    """What belongs to the context is selected chunk by chunk; calls behind every context are dense."""
    model, ids = tiny_model("llama"), ids_of(2, seed=3)
    with apply(model, plan(name)), torch.no_grad():

        def in_chunks(rows: Tensor, ends: list[int]) -> Tensor:
            cache, logits = DynamicCache(config=model.config), []
            for begin, end in zip([0, *ends[:-1]], ends, strict=True):
                logits.append(model(rows[:, begin:end], past_key_values=cache).logits)
            return torch.cat(logits, dim=1)

        with orthorank.context(model, lengths, keep):
            actual = in_chunks(ids, [5, 12, 15, 22])
        for row, context in enumerate(lengths):
            ends = [end for end in (5, 12, 15) if end < context]
            assert_close(actual[row], stepwise(model, ids[row], [*ends, context], keep))


def test_status_counts_chunks_and_single_tokens_of_a_context(tiny_model: Any) -> None:
    """Contexts of 14 and 10 in chunks of 5, 1, 6, 3: 2, 0, 2, 0 of one are selected; 2, 0, 1 of the other.

    With a last token that is forced where each ends: 1 in the last chunk of the first, which had none.
    """
    model, ids = tiny_model("llama"), ids_of(2, 15, seed=6)
    cache = DynamicCache(config=model.config)
    with apply(model, plan("topk")) as handle, torch.no_grad(), orthorank.context(model, [14, 10], 0):
        for chunk in ids.split([5, 1, 6, 3], dim=1):
            model(chunk, past_key_values=cache)
        counts = handle.stats[1]
        assert counts.achieved_ratio == (2 + 0 + 2 + 0 + 2 + 0 + 1) / 24
        assert counts.tokens_updated == 4 + 1 + 3 + 5, "and all tokens behind them"
    cache = DynamicCache(config=model.config)
    with apply(model, plan("topk")) as handle, torch.no_grad(), orthorank.context(model, [14, 10], 1):
        for chunk in ids.split([5, 1, 6, 3], dim=1):
            model(chunk, past_key_values=cache)
        assert handle.stats[1].tokens_updated == 4 + 1 + 3 + 5 + 1


def test_status_counts_the_context_alone(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(2, seed=4)
    with apply(model, plan("topk")) as handle, torch.no_grad():
        with orthorank.context(model, [15, 10]):
            model(ids)
        assert handle.stats[1].tokens_updated == 6 + 7 + 4 + 12
        assert handle.stats[1].achieved_ratio == (6 + 4) / 25


def test_a_thresholded_continuation_is_no_different(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(2, seed=5)
    threshold = {"select": "threshold", "thresholds": dict.fromkeys(LAYERS, 5.0), "decode": "threshold"}
    with apply(model, OrthoRankConfig(layers=LAYERS, **threshold)), torch.no_grad():
        expected = model(ids).logits
        stepped = [stepwise(model, row, [length], 3) for row, length in zip(ids, [3, 20], strict=True)]
        with orthorank.context(model, [3, 20], keep_last=0):
            assert torch.equal(model(ids).logits, expected)
        with orthorank.context(model, [3, 20], keep_last=3):  # of the contexts alone; the others as they score
            forced = model(ids).logits
        assert_close(forced, torch.stack(stepped))
        assert (forced - expected).abs().max() > 1e-3


@pytest.mark.parametrize("keep_last", [-1, 1.5, True, 2**70])
def test_keep_last_is_checked(tiny_model: Any, keep_last: Any) -> None:
    model = tiny_model("llama")
    with apply(model, plan("topk")) as handle:
        for call in (lambda: orthorank.context(model, 3, keep_last), lambda: handle.prefilling(keep_last)):
            with pytest.raises(OrthoRankError, match="keep_last is"):
                call()


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        (0, "lengths is 0; it must be the number of context tokens, 1 or more"),
        ([3, -1], r"lengths is \[3, -1\]"),
        ([], r"lengths is \[\]"),
        ("12", "lengths is '12'"),
        (True, "lengths is True"),
        (torch.tensor([2.0]), r"lengths is \[2.0\]"),
        ([3, 4, 5], r"lengths of orthorank.context\(\) has 3 entries and the call 2 rows"),
    ],
)
def test_lengths_are_checked(tiny_model: Any, lengths: Any, words: str) -> None:
    model = tiny_model("llama")
    with apply(model, plan("topk")), pytest.raises(OrthoRankError, match=words), orthorank.context(model, lengths):
        model(ids_of(2))


def test_where_it_cannot_be(tiny_model: Any) -> None:
    model = tiny_model("llama")
    with pytest.raises(OrthoRankError, match="no plan is applied"):
        orthorank.context(model, 3)
    inside = pytest.raises(OrthoRankError, match=r"called inside orthorank\.context")
    with apply(model, plan("topk")), orthorank.context(model, 3), inside:
        model.generate(ids_of(1), max_new_tokens=2)
