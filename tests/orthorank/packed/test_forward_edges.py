"""One packed layer on tensors: what it is given, how it rounds, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.packed.layer import packed_forward
from tests.orthorank.models import tiny
from tests.orthorank.packed.engine import Engine, LayerParts, Request
from tests.orthorank.packed.served import plan_of, step_of, tokens_of
from tests.orthorank.statement import Row, assert_close


def one_layer(
    model: Any, plan: OrthoRankConfig, rows: list[Row], *given: Tensor, first: int = 7, **how: Any
) -> LayerParts:
    """The first selecting layer of ``model`` on tensors (hidden, residual, and the two outputs) of requests that begin
    with the token ``first``."""
    engine = Engine(model, plan)
    requests = [Request([first] * (row.cached + row.tokens), row.prompt, row.cached) for row in rows]
    batch = engine._batch(tuple((request, row.tokens) for request, row in zip(requests, rows, strict=True)))
    engine.caches[1].zero_()  # what earlier steps would have written
    states = engine.bank.states[:, 0] if rows else None
    parts = LayerParts(model, 1, engine.caches[1], batch, states)
    with torch.no_grad():
        packed_forward(parts, plan, 1, batch.step, *given, **how)
    return parts


def test_all_ranks_select_by_the_scores_they_agree_on(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose own scores differ takes the rows of the others, also where the largest scores are selected."""
    rows = [Row(0, 9, 9), Row(20, 5, 40)]
    given = [torch.randn(14, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    for criterion in ("orthogonal", "inverse"):
        found, sent = [], []
        for own in (True, False):

            def agree(parts: LayerParts, scores: Tensor, own: bool = own, sent: list[Tensor] = sent) -> Tensor:
                sent.append(scores.clone())
                return scores if own else sent[0] + 0 * scores

            monkeypatch.setattr(LayerParts, "agree", agree)
            hidden = given[0] if own else given[0].flip(1)
            outs = [torch.full((14, 64), torch.nan) for _ in range(2)]
            parts = one_layer(models["llama-2"], plan_of("topk", criterion=criterion), rows, hidden, given[1], *outs)
            assert parts.chosen is not None
            found.append(parts.chosen.rows)
        assert (sent[0] > 0).all()
        assert not torch.equal(sent[0].argsort(), sent[1].argsort())
        assert torch.equal(*found)


@pytest.mark.parametrize("select", ["topk", "threshold"])
def test_strided_inputs(models: dict[str, Any], select: str) -> None:
    """Every second row, and columns of wider rows; outputs are contiguous."""
    plan, rows = plan_of(select), [Row(0, 9, 9), Row(20, 5, 40)]
    wide = torch.randn(28, 3, 64, generator=torch.Generator().manual_seed(2))
    hidden, residual = wide[::2, 0], wide[1::2, 2]
    strided = [torch.full((14, 64), torch.nan) for _ in range(2)]
    plain = [torch.full((14, 64), torch.nan) for _ in range(2)]
    before = wide.clone()
    one_layer(models["llama-2"], plan, rows, hidden, residual, *strided)
    one_layer(models["llama-2"], plan, rows, hidden.contiguous(), residual.contiguous(), *plain)
    assert torch.equal(wide, before)
    for a, b in zip(strided, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("select", ["topk", "window", "threshold"])
def test_half_precision_rounds_where_hugging_face_does(select: str, dtype: torch.dtype) -> None:
    """The very tokens that the Hugging Face path selects, from the sum in two parts that layer 0 leaves."""
    model, plan, tokens = tiny("llama-2").to(dtype), plan_of(select), tokens_of(40, 1)
    before, seen, picked = model.model.layers[0], {}, []
    hooks = [
        before.mlp.register_forward_hook(lambda module, args, out: seen.update(hidden=out[0])),
        before.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.update(residual=args[0][0])),
    ]
    with (
        apply(model, plan) as handle,
        torch.no_grad(),
        handle.prefilling(),
        handle.watching(lambda index, positions, call: picked.append(positions[0])),
    ):
        states = model.model(torch.tensor([tokens]), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    outs = [torch.full((40, 64), torch.nan, dtype=dtype) for _ in range(2)]
    parts = one_layer(model, plan, [Row(0, 40, 40)], seen["hidden"], seen["residual"], *outs, first=tokens[0])
    assert parts.chosen is not None
    assert parts.chosen.rows.tolist() == [p for p in picked[0].tolist() if p >= 0]
    others = torch.ones(40, dtype=torch.bool)
    others[parts.chosen.rows] = False
    assert 20 <= others.sum() < 35
    assert torch.equal(outs[1][others], states[1][0][others])
    assert_close((outs[0] + outs[1]).float(), states[2][0].float(), 4 * torch.finfo(dtype).eps)


def test_padding_without_a_request(models: dict[str, Any]) -> None:
    given = [torch.randn(4, 64) for _ in range(2)]
    outs = [torch.full((4, 64), torch.nan) for _ in range(2)]
    one_layer(models["llama-2"], plan_of("topk"), [], *given, *outs)
    assert torch.equal(outs[0], torch.zeros(4, 64))
    assert torch.equal(outs[1], given[0] + given[1])
    one_layer(models["llama-2"], plan_of("topk"), [], *(x[:0] for x in (*given, *outs)))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"criterion": "random"}, "criterion is 'random'"),
        ({"criterion": "prenorm"}, "criterion is 'prenorm'"),
        ({"kv": "selected"}, "kv is 'selected'"),
        ({"update_sink": True}, "update_sink is True"),
        ({"sinks": "auto"}, "sinks is 'auto'"),
        ({"select": "threshold", "thresholds": {1: 0.5, 2: 0.5}, "decode": "threshold"}, "decode is 'threshold'"),
    ],
)
def test_what_a_plan_may_not_ask_for(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        step_of(OrthoRankConfig(layers=[1, 2], **fields), [Row(0, 5, 5)])


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_layer_that_does_not_select(models: dict[str, Any], ratio: float) -> None:
    plan, given = plan_of("topk", keep_ratios={1: ratio}), [torch.zeros(5, 64) for _ in range(4)]
    with pytest.raises(OrthoRankError, match=rf"keep ratio {ratio}; this step was made for 0\.4"):
        one_layer(models["llama-2"], plan, [Row(0, 5, 5)], *given)
