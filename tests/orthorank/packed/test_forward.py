"""`orthorank.packed.layer`: packed requests give what Hugging Face models give each of them alone."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank_kernels import dispatch
from tests.orthorank.packed.engine import Engine, Request
from tests.orthorank.packed.served import assert_rows_as_promised, hugging_face, plan_of, serve, tokens_of
from tests.orthorank.statement import assert_close


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
    # Norm, score and select (in two, by a threshold with forced tokens), gather, attention, add and norm, scatter.
    assert len(ran) == (6 if select == "threshold" else 5)
    for request, own in zip(requests, found, strict=True):
        ends = [8, 12] if request.prompt == 12 and select == "topk" else None
        assert_close(torch.cat(own), hugging_face(models["llama-2"], engine.plan, request, ends), 2e-5)
    assert_rows_as_promised(engine)
