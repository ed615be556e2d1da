"""Plans, requests and steps for tests of the packed layer, and what the Hugging Face path gives for a request alone."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from orthorank import OrthoRankConfig, apply
from orthorank.packed.steps import Step, make_step
from tests.orthorank.packed.engine import Engine, Request
from tests.orthorank.statement import Row, assert_close

CPU = torch.device("cpu")
WINDOW = 8
THRESHOLDS = {"orthogonal": 9.0, "inverse": -9.0, "cosine": 0.1}  # some half of the tokens of these models


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


def step_of(plan: OrthoRankConfig, rows: Sequence[Row]) -> Step:
    """What `make_step` makes of ``rows``, none of which has a sink kept."""
    starts = [0, *accumulate(row.tokens for row in rows)]
    return make_step(plan, starts, [r.cached for r in rows], [r.prompt for r in rows], [0] * len(rows), CPU)


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
    """Of every selecting layer: inputs left alone, unselected rows exactly (0, the sum), selected ones all written.

    Where there is a map, the sum is exact in sinks alone.
    """
    assert engine.ran
    for ran in engine.ran:
        for now, before in zip((ran.hidden, ran.residual), ran.before, strict=True):
            assert torch.equal(now.nan_to_num(0.5), before.nan_to_num(0.5))
        rows = [] if ran.chosen is None else [row for row in ran.chosen.rows.tolist() if row >= 0]
        others = torch.ones(ran.step.tokens, dtype=torch.bool)
        others[rows] = False
        summed = ran.hidden + ran.residual
        assert (ran.out_hidden[: ran.step.tokens][others] == 0).all()
        exact, layer_map = others.clone(), engine.maps[ran.layer]
        if layer_map is not None:
            sinks = ran.step.cu_segments[:-1][ran.step.first_positions == 0].long()
            exact[:] = False
            exact[sinks] = others[sinks]
            assert ((ran.out_residual != summed)[: ran.step.tokens].any(dim=1) | exact | ~others).all()
        assert torch.equal(ran.out_residual[: ran.step.tokens][exact], summed[: ran.step.tokens][exact])
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
