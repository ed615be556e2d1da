"""Corrected plans over packed requests: what the Hugging Face path gives; what runs no maps refuses them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction, LayerMap
from orthorank_kernels import dispatch
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.models import tiny
from tests.orthorank.packed.engine import Engine, Request
from tests.orthorank.packed.served import assert_rows_as_promised, hugging_face, plan_of, serve, tokens_of
from tests.orthorank.packed.test_forward import three_requests
from tests.orthorank.statement import assert_close

PLAN = OrthoRankConfig(
    layers=[1, 2], correction=Correction({2: LayerMap(torch.ones(1, 8), torch.ones(8, 1), torch.ones(8))})
)
RATIOS = {1: {}, 2: {"keep_ratios": {2: 0.0}}, 3: {"layers": [0, 2], "keep_ratios": {0: 0.0, 2: 0.0}}}


def corrected_plan(select: str, **fields: Any) -> OrthoRankConfig:
    plan = plan_of(select, **fields)
    return plan_of(select, **fields, correction=maps(plan.layers))


@pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
@pytest.mark.parametrize("ratios", RATIOS.values(), ids=["selecting", "one removed", "all removed"])
@pytest.mark.parametrize("select", ["topk", "window", "threshold"])
@pytest.mark.parametrize("name", ["llama-2", "qwen3"])
def test_packed_requests_are_requests_alone(
    models: dict[str, Any], name: str, select: str, ratios: dict[str, Any], merged: bool
) -> None:
    """Chunks beside generated tokens, several requests in a step, empty ones, and padding behind them."""
    requests, schedule = three_requests()
    serve(models[name], corrected_plan(select, **ratios), requests, schedule, padding=3, merged=merged)


@pytest.mark.parametrize("select", ["window", "threshold"])
def test_prompts_below_the_least(models: dict[str, Any], select: str) -> None:
    """Of the three one is: each layer updates it, and a removed one still has no map for its first token."""
    requests, schedule = three_requests()
    plan = corrected_plan(select, keep_ratios={2: 0.0}, min_prompt=18)
    serve(models["llama-2"], plan, requests, schedule)
    plans = plan, corrected_plan(select, keep_ratios={2: 0.0})
    dense, selected = (hugging_face(models["llama-2"], each, requests[1], [requests[1].prompt]) for each in plans)
    assert float((dense - selected).abs().max()) > 0.1, "or this shows nothing"


def test_a_map_for_one_layer_of_two(models: dict[str, Any]) -> None:
    requests, schedule = three_requests()
    serve(models["llama-2"], plan_of("topk", correction=maps([2])), requests, schedule)


def test_without_reading_how_many_a_threshold_selects(models: dict[str, Any]) -> None:
    requests, schedule = three_requests()
    serve(models["llama-2"], corrected_plan("threshold"), requests, schedule, read_count=False, padding=2)


def test_nobody_selected(models: dict[str, Any]) -> None:
    """The map is on all tokens of the prompt."""
    plan = corrected_plan("topk", keep_ratio=0.01, keep_last=0)
    engine = serve(models["llama-2"], plan, [Request(tokens_of(14, 8), 12)], [[12], [1], [1]])
    assert [ran.chosen is None for ran in engine.ran] == [True] * 2 + [False] * 4


@pytest.mark.parametrize("select", ["topk", "window"])
def test_a_preempted_request_is_computed_again(models: dict[str, Any], select: str) -> None:
    plan = corrected_plan(select, keep_ratios={2: 0.0})
    engine, request = Engine(models["llama-2"], plan), Request(tokens_of(29, 6), 21)
    first = [engine.run((request, 21))[0]] + [engine.run((request, 1))[0] for _ in range(4)]
    engine.preempt(request)
    assert_close(engine.run((request, 25))[0], torch.cat(first), 2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_rounds_where_hugging_face_does(dtype: torch.dtype) -> None:
    """One layer, of the sum that layer 0 leaves: the very bits of the Hugging Face path."""
    model, plan, tokens = tiny("llama-2").to(dtype), corrected_plan("topk", layers=[1]), tokens_of(40, 1)
    seen: dict[str, Tensor] = {}
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.update(alone=output[0]))
    with apply(model, plan) as handle, handle.prefilling(keep_last=plan.keep_last), torch.no_grad():
        model.model(torch.tensor([tokens]), use_cache=False)
    model = tiny("llama-2").to(dtype)
    engine = Engine(model, plan)
    engine.run((Request(tokens, 40), 40))
    (ran,) = engine.ran
    others = torch.ones(40, dtype=torch.bool)
    assert ran.chosen is not None
    others[ran.chosen.rows.long()] = False
    assert torch.equal(ran.out_residual[others], seen["alone"][others])


@pytest.mark.skipif(not dispatch.interpreting(), reason="on a machine with a GPU, kernels run there alone")
@pytest.mark.parametrize("ratios", [{}, {"keep_ratios": {2: 0.0}}], ids=["selecting", "removed"])
def test_with_the_kernels(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch, ratios: dict[str, Any]) -> None:
    pytest.importorskip("triton")
    engine = Engine(models["llama-2"], corrected_plan("window", layers=[2], **ratios), padding=3)
    run, selecting, ran = dispatch.run, engine._selecting, set()

    def with_triton(op: Any, args: Any, *, backend: str, **others: Any) -> Any:
        ran.add(op.arguments)
        return run(op, args, backend="triton", **others)

    def selecting_with_triton(*args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "run", with_triton)
            return selecting(*args)

    monkeypatch.setattr(engine, "_selecting", selecting_with_triton)
    requests = [Request(tokens_of(13, 1), 12), Request(tokens_of(7, 2), 6)]
    found: list[list[Tensor]] = [[], []]
    for counts in ((8, 6), (5, 1)):
        for own, states in zip(found, engine.run(*zip(requests, counts, strict=True)), strict=True):
            own.append(states)
    assert len(ran) == (2 if ratios else 6)  # norm with score and the map; and what a layer has that selects
    for request, own in zip(requests, found, strict=True):
        assert_close(torch.cat(own), hugging_face(models["llama-2"], engine.plan, request), 2e-5)
    assert_rows_as_promised(engine)


def test_a_layer_without_its_map_is_refused(models: dict[str, Any]) -> None:
    engine = Engine(models["llama-2"], corrected_plan("topk"))
    engine.maps = [None] * 4
    with pytest.raises(OrthoRankError, match=r"the plan corrects layer 1, and no map was given; pass layer_map=ortho"):
        engine.run((Request(tokens_of(9, 1), 9), 9))
    engine = Engine(models["llama-2"], plan_of("topk"))
    engine.maps = [maps([1]).maps[1]] * 4
    with pytest.raises(OrthoRankError, match="a map was given for layer 1, which the plan does not correct"):
        engine.run((Request(tokens_of(9, 1), 9), 9))
