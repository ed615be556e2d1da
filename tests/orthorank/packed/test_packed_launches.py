"""How many kernels a layer over a packed batch launches, beside projections, attention and MLP, on GPUs not there."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig
from orthorank.correction import Correction, LayerMap
from orthorank.packed.layer import PackedParts, RMSNorm, packed_forward
from orthorank.packed.selection import PackedRows
from orthorank.packed.steps import Step
from tests.orthorank.launches import Launches
from tests.orthorank_kernels.fake_gpu import fake_gpus

pytest.importorskip("triton")

TOKENS, REQUESTS, HIDDEN, SEGMENTS, SELECTED, RANK, RATIO = 8192, 4, 4096, 8, 2730, 64, 1 / 3
OWN = {"rms_norm_select": 1}
APART = {"rms_norm_score": 1, "select_tokens": 1}
REST = {"index_select": 1, "zero_": 1, "gather_add_rms_norm": 1, "scatter_rows_": 2}


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda:0")


def ints(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


class Parts(PackedParts):
    """A layer whose modules cost nothing."""

    def __init__(self) -> None:
        self.norm, self.states = RMSNorm(empty(HIDDEN), 1e-5), empty(SEGMENTS, HIDDEN)

    @property
    def input_norm(self) -> RMSNorm:
        return self.norm

    @property
    def pre_mlp_norm(self) -> RMSNorm:
        return self.norm

    def sinks(self, step: Step) -> Tensor:
        return self.states

    def project(self, normed: Tensor) -> None:
        pass

    def attend(self, normed: Tensor, chosen: PackedRows) -> Tensor:
        return empty(chosen.rows.shape[0], HIDDEN)

    def feed_forward(self, fed: Tensor) -> Tensor:
        return torch.empty_like(fed)


class Agreeing(Parts):
    def agree(self, scores: Tensor) -> Tensor:
        return scores


class Merged(Parts):
    """Whose product for keys and values has the map's ``down`` as further rows."""

    def project(self, normed: Tensor) -> Tensor:
        return empty(TOKENS, 1024 + RANK).narrow(1, 1024, RANK)


def launched(parts: type[Parts], forced: int = 0, corrected: bool = False, **plan: Any) -> Counter[str]:
    correction = Correction({1: LayerMap(torch.ones(RANK, 8), torch.ones(8, RANK), torch.ones(8))})
    with fake_gpus() as gpus:
        step = Step(
            tokens=TOKENS,
            requests=REQUESTS,
            cu_tokens=ints(REQUESTS + 1),
            cu_segments=ints(SEGMENTS + 1),
            offsets=ints(SEGMENTS),
            sink_positions=ints(SEGMENTS),
            first_positions=ints(SEGMENTS),
            first_segment=ints(REQUESTS + 1),
            workspace=ints(SEGMENTS),
            counts={RATIO: ints(SEGMENTS)},
            selected={RATIO: SELECTED},
            forced=empty(forced, dtype=torch.int64),
            sink_slots=empty(SEGMENTS, dtype=torch.int64),
        )
        layer, given = parts(), [empty(TOKENS, HIDDEN) for _ in range(4)]
        layer_map = LayerMap(empty(RANK, HIDDEN), empty(HIDDEN, RANK), empty(HIDDEN)) if corrected else None
        followed = OrthoRankConfig(layers=[1], **plan, correction=correction if corrected else None)
        with Launches(gpus) as traced:
            packed_forward(layer, followed, 1, step, *given, layer_map=layer_map, read_count=False)
    return Counter(traced.names)


BELOW: dict[str, Any] = {"select": "threshold", "thresholds": {1: 0.5}}


@pytest.mark.parametrize(
    "plan", [{}, {"criterion": "cosine"}, {"select": "window", "select_window": 256}, BELOW], ids=str
)
def test_norm_score_and_selection_are_one_launch(plan: dict[str, Any]) -> None:
    assert launched(Parts, **plan) == OWN | REST


def test_what_cannot_be_one_launch() -> None:
    """Scores of other ranks, tokens that are forced below a threshold, and another criterion."""
    assert launched(Agreeing) == APART | REST
    assert launched(Parts, forced=3, **BELOW) == APART | REST | {"index_fill_": 1}
    assert launched(Parts, criterion="inverse") == APART | REST | {"neg": 1}


@pytest.mark.parametrize("plan", [{}, BELOW], ids=["topk", "threshold"])
def test_a_map_costs_two_launches_and_one_where_projections_are_merged(plan: dict[str, Any]) -> None:
    assert launched(Parts, corrected=True, **plan) == OWN | REST | {"mm": 1, "add_low_rank": 1}
    assert launched(Merged, corrected=True, **plan) == OWN | REST | {"add_low_rank": 1}


def test_a_removed_layer_with_a_map() -> None:
    removed = launched(Parts, corrected=True, keep_ratios={1: 0.0})
    assert removed == {"rms_norm_score": 1, "mm": 1, "add_low_rank": 1, "zero_": 1}
