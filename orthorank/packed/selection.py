"""Which rows of a step a layer updates."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.packed.steps import Step
from orthorank_kernels import select_tokens
from orthorank_kernels.ops.norm_selection import NormSelection
from orthorank_kernels.ops.selection import Selection

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig


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


def request_of(step: Step, plan: "OrthoRankConfig", layer: int) -> dict[str, Any]:
    """What ``layer`` asks of `select_tokens`: so many of each segment, or all below a number, and where they lie.

    Raises:
        OrthoRankError: the step was made for other ratios.
    """
    if plan.select == "threshold":
        return below(step, plan.thresholds[layer])
    return share(step, plan.ratio(layer))


def share(step: Step, ratio: float) -> dict[str, Any]:
    """`request_of` for a keep ratio: how many in all is known on the host."""
    if ratio not in step.counts:
        known = ", ".join(map(str, step.counts)) or "none"
        raise OrthoRankError(
            f"a layer selects with the keep ratio {ratio}; this step was made for {known}: make it with the layer's "
            "plan, and run layers with ratio 0 or 1 without selection"
        )
    return {"k": step.counts[ratio], "max_selected": step.selected[ratio]} | _layout(step)


def below(step: Step, threshold: float) -> dict[str, Any]:
    """`request_of` for a threshold. How many score less, the device knows."""
    return {"threshold": threshold, "max_selected": step.tokens} | _layout(step)


def _layout(step: Step) -> dict[str, Any]:
    return {
        "cu_seqlens": step.cu_segments,
        "position_offsets": step.offsets,
        "sink_positions": step.sink_positions,
    }


def choose(step: Step, ranks: Tensor, request: dict[str, Any], *, read_count: bool = True) -> PackedRows:
    """The rows of smallest rank that ``request`` asks for.

    Args:
        ranks: float32 ``[tokens or more]``; written to: `Step.forced` gets -inf. read_count: as for `rows_of`.
    """
    if step.forced.shape[0]:
        ranks.index_fill_(0, step.forced, -torch.inf)
    return rows_of(step, select_tokens(ranks, **request), request, read_count=read_count)


def rows_of(
    step: Step, picked: Selection | NormSelection, request: dict[str, Any], *, read_count: bool = True
) -> PackedRows:
    """What was picked segment by segment, request by request.

    Args:
        read_count: with a threshold, True: the host reads how many these are, so that everything behind has its size;
            False: the host waits for nothing, and everything behind has room for all tokens of the step.
    """
    assert picked.rows is not None
    assert picked.cu_selected is not None  # the packed layout has both
    found = PackedRows(picked.rows, picked.positions, picked.cu_selected.index_select(0, step.first_segment))
    if "k" in request or not read_count:
        return found
    count = int(found.cu_selected[-1])
    return found._replace(rows=found.rows[:count], positions=found.positions[:count])
