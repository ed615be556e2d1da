"""Criteria of one's own over a packed batch: requests give what Hugging Face models give each of them alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, register_criterion
from orthorank.common import criteria
from tests.orthorank.packed.served import serve
from tests.orthorank.packed.test_forward import three_requests
from tests.orthorank.packed.test_forward_edges import LayerParts, one_layer
from tests.orthorank.statement import Row


def angle_and_score(x: Tensor, sink: Tensor, valid: Tensor, *, scores: Tensor, layer: int, seed: int) -> Tensor:
    """Uses all that a server gives."""
    return (scores + seed * layer) / (1 + (x.float() - sink.float()[:, None]).abs().amax(dim=-1))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    before = dict(criteria._REGISTERED)
    register_criterion("angle_and_score", angle_and_score, pointwise=True, needs=("scores", "layer", "seed"))
    yield
    criteria._REGISTERED.clear()
    criteria._REGISTERED.update(before)


def plan_of(**how: Any) -> OrthoRankConfig:
    return OrthoRankConfig(layers=[1, 2], keep_ratio=0.4, keep_last=2, criterion="angle_and_score", seed=5, **how)


@pytest.mark.parametrize(
    "how",
    [{}, {"select": "window", "select_window": 8}, {"select": "threshold", "thresholds": {1: 4.0, 2: 5.0}}],
    ids=["topk", "window", "threshold"],
)
def test_packed_requests_are_requests_alone(models: dict[str, Any], how: dict[str, Any]) -> None:
    requests, schedule = three_requests()
    engine = serve(models["llama-2"], plan_of(**how), requests, schedule, padding=3)
    shares = [ran.chosen.rows.shape[0] / ran.step.tokens for ran in engine.ran[:2] if ran.chosen is not None]
    assert all(0.2 < share < 0.8 for share in shares), "the layers select, or this shows nothing"


def test_ranks_that_agree(models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks select by is what the criterion gave, not only the paper's scores."""
    sent: list[Tensor] = []

    def agree(parts: LayerParts, scores: Tensor) -> Tensor:
        sent.append(scores.clone())
        return torch.arange(len(scores), 0, -1, dtype=torch.float32)

    monkeypatch.setattr(LayerParts, "agree", agree)
    given = [torch.randn(9, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    outs = [torch.full((9, 64), torch.nan) for _ in range(2)]
    parts = one_layer(models["llama-2"], plan_of(), [Row(0, 9, 9)], *given, *outs)
    assert parts.chosen is not None
    assert parts.chosen.rows.tolist() == [6, 7, 8]
    assert len(sent) == 2


def test_what_a_criterion_gives_is_not_written_to(models: dict[str, Any]) -> None:
    """Of one token, a channel of its state is a number for it as it lies; that its row is forced changes no state."""
    kept = torch.full((9, 1), 3.0)
    register_criterion("kept", lambda x, sink, valid: kept if len(x) == 9 else x[:, :, 0] * 0, pointwise=True)
    plan = OrthoRankConfig(
        layers=[1, 2], keep_last=2, criterion="kept", select="threshold", thresholds={1: 2.0, 2: 2.0}
    )
    given = [torch.randn(9, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    outs = [torch.full((9, 64), torch.nan) for _ in range(2)]
    parts = one_layer(models["llama-2"], plan, [Row(0, 9, 9)], *given, *outs)
    assert parts.chosen is not None
    assert parts.chosen.rows.tolist() == [7, 8]
    assert (kept == 3.0).all()
