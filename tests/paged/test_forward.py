"""`orthorank.integrations.paged.forward`: packed requests give what Hugging Face models give each of them alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.integrations.paged.forward import selected_forward
from orthorank_kernels import dispatch
from tests.orthorank.naive import assert_close
from tests.orthorank.tiny import tiny
from tests.paged.engine import Engine, LayerParts, Request
from tests.paged.stated import Row, step_of

WINDOW = 8
THRESHOLDS = {"orthogonal": 9.0, "inverse": -9.0, "cosine": 0.1}  # some half of the tokens of these models


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    """With full attention in all layers."""
    return {name: tiny(name, use_sliding_window=False) for name in ("llama-2", "llama-3", "qwen3")}


def plan_of(select: str, **fields: Any) -> OrthoRankConfig:
    how: dict[str, Any] = {
        "topk": {},
        "window": {"select": "window", "select_window": WINDOW},
        "threshold": {
            "select": "threshold",
            "thresholds": dict.fromkeys(
                fields.get("layers", [1, 2]), THRESHOLDS[fields.get("criterion", "orthogonal")]
            ),
        },
    }[select]
    return OrthoRankConfig(**({"layers": [1, 2], "keep_ratio": 0.4, "keep_last": 2} | how | fields))


def tokens_of(count: int, seed: int) -> list[int]:
    return torch.randint(3, 128, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def hugging_face(model: Any, plan: OrthoRankConfig, request: Request, ends: list[int] | None = None) -> Tensor:
    """The last hidden states of ``request`` alone; ``ends``: of the prompt's chunks."""
    ids, cache, found = torch.tensor([request.tokens]), DynamicCache(config=model.config), []
    ends = [*(ends or [request.prompt]), *range(request.prompt + 1, len(request.tokens) + 1)]
    with apply(model, plan) as handle:
        for begin, end in pairwise([0, *ends]):
            chunk = ids[:, begin:end]
            if begin >= request.prompt:
                with handle.decoding():
                    found.append(model.model(chunk, past_key_values=cache)[0])
            else:
                with handle.prefilling(keep_last=plan.keep_last if end == request.prompt else 0):
                    found.append(model.model(chunk, past_key_values=cache)[0])
    return torch.cat(found, dim=1)[0]


def assert_rows_as_promised(engine: Engine) -> None:
    """Of every selecting layer: inputs left alone, unselected rows exactly (0, the sum), selected ones all written."""
    assert engine.ran
    for ran in engine.ran:
        for now, before in zip((ran.hidden, ran.residual), ran.before, strict=True):
            assert torch.equal(now.nan_to_num(0.5), before.nan_to_num(0.5))
        rows = [] if ran.chosen is None else [row for row in ran.chosen.rows.tolist() if row >= 0]
        others = torch.ones(ran.step.tokens, dtype=torch.bool)
        others[rows] = False
        summed = ran.hidden + ran.residual
        assert (ran.out_hidden[: ran.step.tokens][others] == 0).all()
        assert torch.equal(ran.out_residual[: ran.step.tokens][others], summed[: ran.step.tokens][others])
        assert (ran.out_hidden[rows] != 0).any(dim=1).all()
        assert torch.isfinite(ran.out_residual[: ran.step.tokens]).all()
        if ran.chosen is not None and engine.plan.select != "threshold":
            assert len(rows) == ran.step.selected[engine.plan.ratio(ran.layer)]


def serve(model: Any, plan: OrthoRankConfig, requests: list[Request], schedule: list[list[int]], **how: Any) -> Engine:
    """Run the steps, in which each request computes so many tokens, and compare every request with itself alone."""
    engine = Engine(model, plan, **how)
    found: list[list[Tensor]] = [[] for _ in requests]
    for counts in schedule:
        chunks = [(r, n) for r, n in zip(requests, counts, strict=True) if n >= 0]
        for request, states in zip((r for r, _ in chunks), engine.run(*chunks), strict=True):
            found[requests.index(request)].append(states)
    ends: list[list[int]] = [[] for _ in requests]
    for i, request in enumerate(requests):
        assert request.computed == len(request.tokens), "the schedule computes everything"
        at = 0
        for counts in schedule:
            at += max(counts[i], 0)
            ends[i].append(min(at, request.prompt))
    for request, states, own in zip(requests, found, ends, strict=True):
        chunked = sorted({end for end in own if end}) if plan.select == "topk" else None
        assert_close(torch.cat(states), hugging_face(model, plan, request, chunked), 2e-5)
    assert_rows_as_promised(engine)
    return engine


def three_requests() -> tuple[list[Request], list[list[int]]]:
    """Chunks of one prompt beside generated tokens of another; -1: not in the step, 0: there without a token."""
    requests = [Request(tokens_of(43, 1), 40), Request(tokens_of(20, 2), 17), Request(tokens_of(30, 3), 30)]
    requests[2].tokens[0] = requests[0].tokens[0]
    return requests, [[24, 17, -1], [0, 1, 24], [16, 1, 6], [1, 1, -1], [1, -1, -1], [1, -1, -1]]


@pytest.mark.parametrize("criterion", ["orthogonal", "inverse", "cosine"])
@pytest.mark.parametrize("select", ["topk", "window", "threshold"])
@pytest.mark.parametrize("name", ["llama-2", "qwen3"])
def test_packed_requests_are_requests_alone(models: dict[str, Any], name: str, select: str, criterion: str) -> None:
    """With window and threshold, chunks are whole prompts; with topk, the Hugging Face path has the same chunks."""
    requests, schedule = three_requests()
    plan = plan_of(select, criterion=criterion)
    engine = serve(models[name], plan, requests, schedule, padding=3)
    chosen = [r.chosen.rows.shape[0] / r.step.tokens for r in engine.ran[:2] if r.chosen is not None]
    assert all(0.2 < share < 0.8 for share in chosen), "the layers select, or this shows nothing"


@pytest.mark.parametrize("select", ["topk", "window", "threshold"])
def test_a_layer_with_biases_and_other_rotary_tables(models: dict[str, Any], select: str) -> None:
    requests, schedule = three_requests()
    serve(models["llama-3"], plan_of(select), requests, schedule)


def test_without_reading_how_many_a_threshold_selects(models: dict[str, Any]) -> None:
    requests, schedule = three_requests()
    plan = plan_of("threshold")
    room = serve(models["llama-2"], plan, requests, schedule, read_count=False, padding=2)
    again, _ = three_requests()
    read = serve(models["llama-2"], plan, again, schedule, padding=2)
    for a, b in zip(room.ran, read.ran, strict=True):
        assert a.chosen is not None
        assert len(a.chosen.rows) == a.step.tokens
        tokens = slice(0, a.step.tokens)
        torch.testing.assert_close(a.out_hidden[tokens], b.out_hidden[tokens], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("select", ["window", "threshold"])
@pytest.mark.parametrize("ends", [[8, 40], [16, 24, 40], [32, 40]])
def test_the_schedule_changes_nothing(models: dict[str, Any], select: str, ends: list[int]) -> None:
    """Forced tokens in several windows included; a threshold takes any chunks."""
    if select == "threshold":
        ends = [end - 3 for end in ends[:-1]] + ends[-1:]
    plan = plan_of(select, keep_last=11)
    once, chunked = (Engine(models["llama-2"], plan) for _ in range(2))
    tokens = tokens_of(40, 4)
    whole = once.run((Request(tokens, 40), 40))[0]
    request = Request(tokens, 40)
    parts = [chunked.run((request, end - begin))[0] for begin, end in pairwise([0, *ends])]
    assert_close(torch.cat(parts), whole, 2e-5)
    assert_close(whole, hugging_face(models["llama-2"], plan, request), 2e-5)


@pytest.mark.parametrize("select", ["topk", "window", "threshold"])
def test_a_preempted_request_is_computed_again(models: dict[str, Any], select: str) -> None:
    """Prompt and generated tokens in one step, or cut where the engine likes, behind the prompt: as before."""
    plan = plan_of(select)
    for cut in ([29], [25, 4]):
        engine = Engine(models["llama-2"], plan)
        request, other = Request(tokens_of(29, 6), 21), Request(tokens_of(12, 7), 9)
        first = [engine.run((request, 21), (other, 9))[0]]
        first += [engine.run((request, 1))[0] for _ in range(4)]
        engine.preempt(request)
        engine.run((other, 3))
        again = torch.cat([engine.run((request, count))[0] for count in cut])
        assert_close(again[:25], torch.cat(first), 2e-5)
        assert_close(again, hugging_face(models["llama-2"], plan, request), 2e-5)


def test_layers_of_every_kind_in_one_plan(models: dict[str, Any]) -> None:
    """Removed, dense, selecting; two ratios; and layer 3, which the plan does not name."""
    for ratios in ({1: 0.25}, {1: 0.0}, {2: 0.0}, {1: 1.0, 2: 0.6}):
        requests, schedule = three_requests()
        serve(models["llama-2"], plan_of("topk", keep_ratios=ratios), requests, schedule)
        requests, schedule = three_requests()
        serve(models["llama-2"], plan_of("window", keep_ratios=ratios), requests, schedule)


@pytest.mark.parametrize("select", ["topk", "window"])
def test_prompts_of_one_and_two_tokens_and_a_window_over_everything(models: dict[str, Any], select: str) -> None:
    requests = [Request(tokens_of(n + 1, n), n) for n in (1, 2, 3)]
    wide = {"select_window": 4096} if select == "window" else {}
    for plan in (plan_of(select, **wide), plan_of(select, keep_last=0, keep_ratio=0.999, **wide)):
        for request in requests:
            request.computed, request.blocks = 0, []
        serve(models["llama-2"], plan, requests, [[1, 2, 3], [1, 1, 1]])


def test_a_bank_of_one(models: dict[str, Any]) -> None:
    requests = [Request(tokens_of(18, 8), 18), Request(tokens_of(18, 9), 18)]
    serve(models["llama-2"], plan_of("window"), requests, [[8, -1], [-1, 8], [10, -1], [-1, 10]], capacity=1)


def test_nobody_selected(models: dict[str, Any]) -> None:
    """A ratio too small for a single token: keys and values are still written."""
    requests = [Request(tokens_of(14, 8), 12)]
    engine = serve(models["llama-2"], plan_of("topk", keep_ratio=0.01, keep_last=0), requests, [[12], [1], [1]])
    assert [ran.chosen is None for ran in engine.ran] == [True] * 2 + [False] * 4
    engine = serve(
        models["llama-2"],
        plan_of("threshold", thresholds={1: -1.0, 2: -1.0}, keep_last=0),
        [Request(tokens_of(12, 8), 12)],
        [[12]],
    )
    assert all(ran.chosen is None for ran in engine.ran)


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
        selected_forward(parts, plan, 1, batch.step, *given, **how)
    return parts


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


@pytest.mark.skipif(not dispatch.interpreting(), reason="on a machine with a GPU, kernels run there alone")
@pytest.mark.parametrize(
    ("select", "read_count"),
    [
        ("window", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("topk", True), ("threshold", False))),
    ],
)
def test_with_the_kernels(
    models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, select: str, read_count: bool
) -> None:
    """In Triton's interpreter: every op of the layer, over padding, empty requests and rows that are not there."""
    pytest.importorskip("triton")
    engine = Engine(models["llama-2"], plan_of(select, layers=[2]), read_count=read_count, padding=3)
    run, selecting, ran = dispatch.run, engine._selecting, set()

    def with_triton(op: Any, args: Any, *, backend: str, **others: Any) -> Any:
        ran.add(op)
        return run(op, args, backend="triton", **others)

    def selecting_with_triton(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "run", with_triton)
            return selecting(*args)

    monkeypatch.setattr(engine, "_selecting", selecting_with_triton)
    requests = [Request(tokens_of(13, 1), 12), Request(tokens_of(7, 2), 6), Request(tokens_of(5, 3), 5)]
    found: list[list[Tensor]] = [[], [], []]
    for counts in ((8, 6, 0), (5, 1, 5)):
        for own, states in zip(found, engine.run(*zip(requests, counts, strict=True)), strict=True):
            own.append(states)
    assert len(ran) == 6  # norm and score, select, gather, attention, add and norm, scatter
    for request, own in zip(requests, found, strict=True):
        ends = [8, 12] if request.prompt == 12 and select == "topk" else None
        assert_close(torch.cat(own), hugging_face(models["llama-2"], engine.plan, request, ends), 2e-5)
    assert_rows_as_promised(engine)
