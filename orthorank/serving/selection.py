"""Which rows of a step a layer updates."""

from typing import NamedTuple

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.serving.steps import Step
from orthorank_kernels import select_tokens
from orthorank_kernels.ops.selection import Selection


class PackedRows(NamedTuple):
    """The rows that a layer updates, request by request, each in position order.

    Args:
        rows: int32 ``[n]``, indices among the step's tokens; -1 past the last one, where room is left.
        positions: int32 ``[n]``, the same counted in each request, its cached tokens included; -1 likewise.
        cu_selected: int32 ``[requests + 1]``, where each request begins in them.
    """

    rows: Tensor
    positions: Tensor
    cu_selected: Tensor


def choose_share(step: Step, ranks: Tensor, ratio: float) -> PackedRows:
    """The rows of smallest rank in every segment, as many as ``ratio`` says: how many in all is known on the host.

    Args:
        ranks: float32 ``[tokens or more]``; written to: the forced rows get -inf.

    Raises:
        OrthoRankError: the step was made for other ratios.
    """
    if ratio not in step.counts:
        known = ", ".join(map(str, step.counts)) or "none"
        raise OrthoRankError(
            f"a layer selects with the keep ratio {ratio}; this step was made for {known}: make it with the layer's "
            "plan, and run layers with ratio 0 or 1 without selection"
        )
    picked = select_tokens(
        _forced(step, ranks),
        step.counts[ratio],
        cu_seqlens=step.cu_segments,
        position_offsets=step.offsets,
        sink_positions=step.sink_positions,
        max_selected=step.selected[ratio],
    )
    return _by_request(step, picked)


def choose_below(step: Step, ranks: Tensor, threshold: float, *, read_count: bool) -> PackedRows:
    """The rows that rank below ``threshold``. How many these are, the device knows.

    Args:
        ranks: as for `choose_share`.
        read_count: True: the host reads that number, so that everything behind has its size; False: the host waits for
            nothing, and everything behind has room for all tokens of the step.
    """
    picked = select_tokens(
        _forced(step, ranks),
        threshold=threshold,
        cu_seqlens=step.cu_segments,
        position_offsets=step.offsets,
        sink_positions=step.sink_positions,
        max_selected=step.tokens,
    )
    chosen = _by_request(step, picked)
    if not read_count:
        return chosen
    count = int(chosen.cu_selected[-1])
    return chosen._replace(rows=chosen.rows[:count], positions=chosen.positions[:count])


def _forced(step: Step, ranks: Tensor) -> Tensor:
    return ranks.index_fill_(0, step.forced, -torch.inf)


def _by_request(step: Step, picked: Selection) -> PackedRows:
    """What was picked segment by segment."""
    assert picked.rows is not None
    assert picked.cu_selected is not None  # the packed layout has both
    return PackedRows(picked.rows, picked.positions, picked.cu_selected.index_select(0, step.first_segment))
