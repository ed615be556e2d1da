"""Top-k inside windows: as stated, whatever the chunks and the padding, and without waiting for a device."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache

from orthorank import OrthoRankConfig, apply, status
from orthorank.calls.context import ForwardContext
from orthorank.calls.reading import Phase, read_call
from orthorank.correction import Correction
from orthorank.hf.selection import prepared, windows_of
from tests.orthorank import statement
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.statement import assert_close

LAYERS, W = [1, 2], 8
with_maps = pytest.mark.parametrize("corrected", [None, maps(LAYERS)], ids=["plain", "corrected"])


def plan(**fields: Any) -> OrthoRankConfig:
    settings = {"layers": LAYERS, "keep_ratio": 0.4, "select": "window", "select_window": W} | fields
    return OrthoRankConfig(**settings)


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def chunked(model: Any, ids: Tensor, ends: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of prompts that come in chunks which end at ``ends``."""
    cache, logits = DynamicCache(config=model.config), []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        extra = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        logits.append(model(ids[:, begin:end], past_key_values=cache, **extra).logits)
    return torch.cat(logits, dim=1)


def rows_alone(model: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    return [model(ids[i : i + 1, mask[i] == 1], use_cache=False).logits[0] for i in range(len(ids))]


@pytest.mark.parametrize("tokens", [5, 8, 29])
def test_each_window_selects_its_own(tiny_model: Any, family: str, tokens: int) -> None:
    model, ids = tiny_model(family), ids_of(1, tokens)
    rule = partial(statement.windows_mask, window=W, ratio=0.4)
    expected = statement.logits_by_rule(model, ids, dict.fromkeys(LAYERS, rule))
    with apply(model, plan()) as handle, torch.no_grad():
        assert_close(model(ids, use_cache=False).logits, expected)
        assert_close(model(ids).logits, expected)
        assert handle.stats[1].tokens_updated == 2 * sum(int(0.4 * min(W, tokens - i)) for i in range(0, tokens, W))
        assert_close(model(ids.expand(3, tokens)).logits[1:2], expected)
        assert "0." in str(status(model)).splitlines()[1]


@pytest.mark.parametrize("keep_last", [1, 3, 11])
def test_keep_last_counts_in_the_windows_it_falls_in(tiny_model: Any, keep_last: int) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 29)
    rule = partial(statement.windows_mask, window=W, ratio=0.15, keep_last=keep_last)
    expected = statement.logits_by_rule(model, ids, dict.fromkeys(LAYERS, rule))
    with apply(model, plan(keep_ratio=0.15)) as handle, torch.no_grad(), handle.prefilling(keep_last=keep_last):
        assert_close(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("ratio", [0.05, 0.4])
@pytest.mark.parametrize("update_sink", [False, True])
def test_the_sink_is_in_the_first_window(tiny_model: Any, update_sink: bool, ratio: float) -> None:
    """Least orthogonal of all to itself: with the inverse criterion only its rule keeps it out."""
    model, ids = tiny_model("llama"), ids_of(1, 21, seed=8)
    for criterion in ("inverse", "orthogonal"):
        rule = partial(statement.windows_mask, window=W, ratio=ratio, keep_last=1, update_sink=update_sink)
        expected = statement.logits_by_rule(model, ids, dict.fromkeys(LAYERS, rule), criterion)
        settings = {"keep_ratio": ratio, "criterion": criterion, "update_sink": update_sink}
        with apply(model, plan(**settings)) as handle, torch.no_grad(), handle.prefilling(keep_last=1):
            assert_close(model(ids, use_cache=False).logits, expected)


@with_maps
@pytest.mark.parametrize("ends", [[8, 29], [16, 24, 29], [8, 16, 24, 28], [24, 27]])
def test_chunks_that_end_on_multiples_change_nothing(
    tiny_model: Any, family: str, ends: list[int], corrected: Correction | None
) -> None:
    model, ids = tiny_model(family), ids_of(2, ends[-1], seed=1)
    with apply(model, plan(correction=corrected)), torch.no_grad():
        assert_close(chunked(model, ids, ends), model(ids, use_cache=False).logits)


def test_a_chunk_that_begins_inside_a_window_has_the_rest_of_it_for_a_window(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 24)

    def cut_at_5(scores: Tensor) -> Tensor:
        return torch.cat(
            [
                statement.windows_mask(scores[:5], W, 0.4),
                statement.selected_mask(scores[5:8], k=1, sink_inside=False),
                statement.windows_mask(scores, W, 0.4)[8:],
            ]
        )

    expected = statement.logits_by_rule(model, ids, {2: cut_at_5})
    with apply(model, plan(layers=[2])), torch.no_grad():
        assert_close(chunked(model, ids, [5, 24]), expected)
        whole = model(ids, use_cache=False).logits
    assert not torch.allclose(whole, expected, atol=1e-3), "the cut must matter, or this shows nothing"


@with_maps
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("update_sink", [False, True])
def test_padded_rows_are_rows_alone(
    tiny_model: Any, family: str, side: str, update_sink: bool, corrected: Correction | None
) -> None:
    model, ids = tiny_model(family), ids_of(3, 30, seed=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 7, 19)):
        mask[row, slice(0, padding) if side == "left" else slice(30 - padding, 30)] = 0
    with apply(model, plan(update_sink=update_sink, correction=corrected)) as handle, torch.no_grad():
        together = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        counted = handle.stats[2].tokens_updated
        alone = rows_alone(model, ids, mask)
        assert handle.stats[2].tokens_updated == 2 * counted
        for row in range(3):
            assert_close(together[row, mask[row] == 1], alone[row])
        if side == "right":  # the rows begin together, so that chunks can end on multiples in all of them
            assert_close(chunked(model, ids, [8, 24, 30], mask)[mask == 1], torch.cat(alone))


@with_maps
def test_one_window_over_everything_is_top_k(tiny_model: Any, corrected: Correction | None) -> None:
    model, ids = tiny_model("llama"), ids_of(2, 26, seed=4)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    for extra in ({}, {"attention_mask": mask}):
        with apply(model, plan(select="topk", select_window=None, correction=corrected)), torch.no_grad():
            expected = model(ids, **extra).logits
        with apply(model, plan(select_window=1000, correction=corrected)), torch.no_grad():
            actual = model(ids, **extra).logits
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1, 9:], expected[1, 9:])


@with_maps
def test_generation(tiny_model: Any, family: str, corrected: Correction | None) -> None:
    """The prompt is selected in windows, its last token always; what follows is dense, padded batches like rows."""
    model, ids = tiny_model(family), ids_of(2, 21, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with apply(model, plan(keep_ratio=0.2, correction=corrected)) as handle:
        together = model.generate(ids, attention_mask=mask, **greedy)[:, 21:]
        updated = handle.stats[1].tokens_updated
        alone = [model.generate(ids[i : i + 1, mask[i] == 1], **greedy)[0, -5:] for i in range(2)]
        no_cache = model.generate(ids, attention_mask=mask, use_cache=False, **greedy)[:, 21:]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together, no_cache)
    assert updated == (1 + 1) + (1 + 1 + 1) + 2 * 4, "windows of 8 and 7; of 8, 8 and 5; four dense steps of two rows"


@pytest.mark.parametrize("seed", range(40))
def test_device_and_host_count_alike(seed: int) -> None:
    """Without padding the room is what the windows select, to the token; with it, enough."""
    draw = random.Random(seed)
    window, tokens, past = draw.randint(1, 12), draw.randint(1, 40), draw.choice([0, 0, draw.randint(1, 30)])
    prompt = draw.randint(1, tokens)
    call = ForwardContext(2, tokens, past, prompt, keep_last=min(prompt, draw.choice([0, 1, 2, 15])))
    call = ForwardContext(**(vars(call) | {"update_sink": draw.random() < 0.5}))
    ratio = draw.choice([0.05, 1 / 3, 0.29, 0.8, 0.99])
    cached = None if past == 0 else torch.tensor([-1, -1], dtype=torch.int32)
    plain = windows_of(ForwardContext(**(vars(call) | {"sink_positions": cached})), window, ratio, torch.device("cpu"))
    assert plain.counts.view(2, -1).sum(1).tolist() == [plain.most, plain.most]
    begin = torch.tensor([0, draw.randint(0, tokens - 1)], dtype=torch.int32)
    padded = vars(call) | {
        "starts": begin,
        "lengths": tokens - begin,
        "key_starts": begin if past == 0 else begin * 0,
        "sink_positions": begin if past == 0 else cached,
    }
    windows = windows_of(ForwardContext(**padded), window, ratio, torch.device("cpu"))
    rows = windows.counts.view(2, -1).sum(1)
    assert windows.cu_seqlens[-1] == 2 * tokens
    assert (windows.cu_seqlens.diff() >= windows.counts).all()
    assert rows[0] == plain.most
    assert rows.max() <= windows.most


@pytest.mark.parametrize("padding", [False, True])
def test_nothing_waits_for_a_device(tiny_model: Any, padding: bool) -> None:
    """Fake tensors have no values: whoever reads one fails."""
    from orthorank.hf.selection import pick

    with FakeTensorMode():
        ranks = torch.empty(2, 29)
        call = read_call((2, 29), ranks.device, Phase(keep_last=2), {})
        if padding:
            row = torch.ones(2, dtype=torch.int32)
            call = ForwardContext(
                **(vars(call) | {"starts": row, "lengths": row * 20, "key_starts": row, "sink_positions": row})
            )
        call = prepared(call, plan(), ranks.device)
        positions, counts = pick(plan(), 1, call, ranks, call.sink_positions)
        assert (positions.shape, counts.shape) == ((2, 13 if padding else 9 + 2), (2,))
