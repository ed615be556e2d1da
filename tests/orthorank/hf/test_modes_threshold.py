"""Selection below a threshold: as stated, and with ``decode="threshold"`` the same however the tokens come."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from orthorank import OrthoRankConfig, OrthoRankError, apply, status
from orthorank.correction import Correction
from orthorank.stack.layers import LayerStack
from tests.orthorank import statement
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.statement import assert_close

LAYERS, TOKENS = [1, 2], 19
MAPS = maps(LAYERS)


def ids_of(rows: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def plan(model: Any, decode: str = "threshold", keep_last: int = 0, **fields: Any) -> OrthoRankConfig:
    """Thresholds in the widest gap between scores, near the median, of a row that has nothing to do with the tests."""
    stack, taus = LayerStack(model), {}
    inputs = stack.embed(ids_of(1, 64, seed=99))
    h = inputs.hidden_states
    for layer in range(stack.num_layers):
        if layer in LAYERS:
            x = stack.normed(layer, h)[0].double()
            scores = (x[1:] @ x[0]).abs().sort().values[20:44]
            widest = scores.diff().argmax()
            taus[layer] = float((scores[widest] + scores[widest + 1]) / 2)
        h = stack.run(layer, h, inputs)
    settings = {"select": "threshold", "thresholds": taus, "decode": decode, "keep_last": keep_last} | fields
    return OrthoRankConfig(layers=LAYERS, **settings)


def in_chunks(model: Any, ids: Tensor, sizes: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of rows that come in chunks of ``sizes`` tokens over one cache."""
    cache, logits, end = DynamicCache(config=model.config), [], 0
    for size in sizes:
        begin, end = end, end + size
        extra = {} if mask is None else {"attention_mask": mask[:, :end]}
        if mask is not None:
            extra["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, begin:end]
        logits.append(model(ids[:, begin:end], past_key_values=cache, **extra).logits)
    return torch.cat(logits, dim=1)


def test_all_that_score_less_are_updated(tiny_model: Any, family: str) -> None:
    model, ids = tiny_model(family), ids_of(1, TOKENS, seed=1)
    followed = plan(model)
    expected = statement.logits_by_rule(model, ids, {i: statement.below(tau) for i, tau in followed.thresholds.items()})
    with apply(model, followed) as handle, torch.no_grad():
        assert_close(model(ids, use_cache=False).logits, expected)
        assert_close(model(ids).logits, expected)
        rows = status(model).rows
    assert rows[1].tokens_in == 2 * TOKENS
    assert 0 < rows[1].tokens_updated < 2 * TOKENS
    assert rows[1].achieved_ratio == rows[1].tokens_updated / (2 * TOKENS)
    assert handle.stats[1].achieved_ratio == rows[1].achieved_ratio


@pytest.mark.parametrize("corrected", [None, MAPS], ids=["plain", "corrected"])
@pytest.mark.parametrize("sizes", [[TOKENS], [1] * TOKENS, [1, 7, 1, 1, 9], [12, 1, 6]])
def test_any_chunks_are_one_call(tiny_model: Any, family: str, sizes: list[int], corrected: Correction | None) -> None:
    model, ids = tiny_model(family), ids_of(2, TOKENS, seed=2)
    with apply(model, plan(model, correction=corrected)) as handle, torch.no_grad():
        expected = model(ids, use_cache=False).logits
        updated = [handle.stats[layer].tokens_updated for layer in LAYERS]
        assert_close(in_chunks(model, ids, sizes), expected)
        assert [handle.stats[layer].tokens_updated for layer in LAYERS] == [2 * count for count in updated]
        with handle.decoding():  # says that tokens are generated ones, of which this plan makes no difference
            assert_close(model(ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": "inverse"},
        {"update_sink": True},
        {"criterion": "random"},
        {"correction": MAPS},
        {"correction": MAPS, "update_sink": True},
    ],
    ids=str,
)
def test_padded_batches_and_chunks_are_rows_alone(tiny_model: Any, side: str, options: dict[str, Any]) -> None:
    model, ids = tiny_model("llama"), ids_of(3, TOKENS, seed=3)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 5, 11)):
        mask[row, slice(0, padding) if side == "left" else slice(TOKENS - padding, TOKENS)] = 0
    followed = plan(model)
    if options.get("criterion") == "inverse":
        options = options | {"thresholds": {layer: -tau for layer, tau in followed.thresholds.items()}}
    if options.get("criterion") == "random":
        options = options | {"thresholds": dict.fromkeys(LAYERS, 2.0**23)}  # hashes are below 2^24
    followed = plan(model, **options)
    with apply(model, followed) as handle, torch.no_grad():
        alone = [model(ids[i : i + 1, mask[i] == 1], use_cache=False).logits[0] for i in range(3)]
        counted = handle.stats[1].tokens_updated
        for sizes in ([TOKENS], [1] * TOKENS, [6, 1, 12]):
            assert_close(in_chunks(model, ids, sizes, mask)[mask == 1], torch.cat(alone))
        assert handle.stats[1].tokens_updated == 4 * counted
        assert 0 < handle.stats[1].achieved_ratio < 1


@pytest.mark.parametrize("corrected", [None, MAPS], ids=["plain", "corrected"])
def test_generation_selects_every_token_alike(tiny_model: Any, family: str, corrected: Correction | None) -> None:
    """Greedy tokens with the cache are those of one call over all of them; padded rows are rows alone."""
    model, ids = tiny_model(family), ids_of(2, 9, seed=4)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    greedy: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with apply(model, plan(model, correction=corrected)) as handle, torch.no_grad():
        together = model.generate(ids, attention_mask=mask, **greedy)[:, 9:]
        assert handle.stats[1].achieved_ratio < 1
        for row in range(2):
            alone = model.generate(ids[row : row + 1, mask[row] == 1], **greedy)
            assert torch.equal(together[row], alone[0, -8:])
            again = model(alone, use_cache=False).logits[0, -9:-1].argmax(-1)
            assert torch.equal(again, together[row])
        looked_up = model.generate(ids[1:], prompt_lookup_num_tokens=3, **greedy)
        assert torch.equal(looked_up[0, 9:], together[1])


def test_keep_last_is_the_prompts_with_candidates_behind_it(tiny_model: Any) -> None:
    """In `generate()` the prompt's last tokens are updated, wherever they stand in the call."""
    from orthorank.calls.reading import Phase, phase_of

    model, ids = tiny_model("llama"), ids_of(2, TOKENS, seed=5)
    followed = plan(model, keep_last=2)

    def rule(tau: float) -> statement.Rule:
        return lambda scores: statement.below(tau)(scores) | (torch.arange(TOKENS) == 11) | (torch.arange(TOKENS) == 12)

    expected = statement.logits_by_rule(model, ids[:1], {i: rule(tau) for i, tau in followed.thresholds.items()})
    with apply(model, followed) as handle, torch.no_grad(), phase_of(handle, Phase(prompt=13, keep_last=2)):
        assert_close(model(ids, use_cache=False).logits[:1], expected)
        assert_close(in_chunks(model, ids, [13, 1, 1, 4])[:1], expected)


def test_dense_decoding_after_a_thresholded_prompt(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 12, seed=6)
    followed = plan(model, decode="dense")

    def rule(tau: float) -> statement.Rule:
        return lambda scores: statement.below(tau)(scores) | (torch.arange(12) >= 8)

    expected = statement.logits_by_rule(model, ids, {i: rule(tau) for i, tau in followed.thresholds.items()})
    with apply(model, followed) as handle, torch.no_grad():
        assert_close(in_chunks(model, ids, [8, 1, 1, 1, 1]), expected)
        counts = handle.stats[1]
        assert counts.achieved_ratio == (counts.tokens_updated - 4) / 8, "dense tokens are no part of the ratio"


def test_counts_on_a_device_are_summed_without_end() -> None:
    from orthorank.hf.status import Total

    total = Total()
    for number in range(2500):
        total.add(torch.tensor(number))
        total.add(1)
    assert len(total._pending) < 1024, "nobody reads, and yet they do not pile up"
    assert total.value() == 2500 * 2499 // 2 + 2500
    assert total.value() == 2500 * 2499 // 2 + 2500


def test_a_dense_cache_is_refused(tiny_model: Any) -> None:
    model, ids = tiny_model("llama"), ids_of(1, 6)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    with apply(model, plan(model)), pytest.raises(OrthoRankError, match="use a plan with decode='dense' and continue"):
        model(ids[:, :1], past_key_values=cache)


def test_the_room_is_as_wide_as_what_is_selected(tiny_model: Any) -> None:
    """A threshold below every score: nothing is left to do but keys and values."""
    model, ids = tiny_model("llama"), ids_of(2, TOKENS, seed=7)
    seen: list[tuple[int, ...]] = []
    followed = plan(model, thresholds={1: -1.0, 2: 1e9})
    with apply(model, followed) as handle, torch.no_grad(), handle.watching(lambda _, at, __: seen.append(at.shape)):
        model(ids)
    assert seen == [(2, 0), (2, TOKENS - 1)]
