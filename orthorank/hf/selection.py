"""Which tokens of a call a layer updates, once they are ranked: so many, so many of each window, or all below a number.

The kernels select from whole rows and force tokens at a row's end alone. What goes beyond that is brought into their
terms here: forced tokens elsewhere get rank -inf, and windows become packed sequences (`orthorank.hf.windows`). Nothing
here waits for a device, except `fitted`, which says when.
"""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthorank.calls.call import Call
from orthorank.config import OrthoRankConfig
from orthorank.hf.layer_plan import threshold_of
from orthorank.hf.windows import is_exact, select_in_windows, windows_by_ratio
from orthorank_kernels import select_tokens

WORTH_A_WAIT = 256  # tokens of a call, from which dropping empty columns saves more time than reading a count takes


class Picked(NamedTuple):
    """What is updated.

    Args:
        positions: int32 ``[batch, most]``, ascending, -1 past a row's count.
        counts: int32 ``[batch]``.
    """

    positions: Tensor
    counts: Tensor


def prepared(call: Call, plan: OrthoRankConfig, device: torch.device) -> Call:
    """``call`` with what every selecting layer of ``plan`` would compute anew, on ``device``."""
    workspace = torch.zeros(call.batch, dtype=torch.int32, device=device)
    call = dataclasses.replace(call, workspace=workspace, update_sink=plan.update_sink)
    if call.lengths is not None:
        call = dataclasses.replace(call, valid=call.lengths.sum())
    if plan.select == "window":
        return dataclasses.replace(call, windows=windows_by_ratio(plan, call, device))
    if plan.select == "threshold" or call.lengths is None:
        return call
    ratios = {plan.ratio(layer) for layer in plan.selecting}
    counted = {ratio: (each, each.sum()) for ratio in ratios if isinstance(each := call.counts(ratio)[0], Tensor)}
    return dataclasses.replace(call, counted=counted)


def is_plain(plan: OrthoRankConfig, call: Call) -> bool:
    """Whether `request` says it all: whole rows, and forced tokens at their ends alone."""
    return plan.select != "window" and call.forced_at_end is not None


def request(plan: OrthoRankConfig, layer: int, call: Call) -> dict[str, Any]:
    """How ``plan`` selects in ``layer``, as arguments of `select_tokens`: k or threshold, keep_last and room."""
    forced = call.forced_at_end or 0
    if plan.select == "threshold":
        return {"threshold": threshold_of(plan, layer), "keep_last": forced, "max_selected": call.tokens}
    each, most = call.counts(plan.ratio(layer))
    return {"k": each, "keep_last": forced, "max_selected": most}


def pick(plan: OrthoRankConfig, layer: int, call: Call, ranks: Tensor, sinks: Tensor | None) -> Picked:
    """The tokens that ``plan`` selects in ``layer`` by their ``ranks``.

    Args:
        ranks: float32 ``[batch, tokens]``, the smallest first; sinks: as ``sink_positions`` of `select_tokens`.
    """
    if not is_plain(plan, call):
        ranks = torch.where(call.forced_mask(ranks.device), -torch.inf, ranks)
    if plan.select == "window":
        return Picked(*select_in_windows(plan, layer, call, ranks))
    chosen = select_tokens(
        ranks,
        **request(plan, layer, call),
        starts=call.starts,
        lengths=call.lengths,
        sink_positions=sinks,
    )
    return Picked(chosen.positions, chosen.counts)


def count_of(plan: OrthoRankConfig, layer: int, call: Call, positions: Tensor, counts: Tensor) -> int | Tensor:
    """How many tokens are updated in all: an int where it is known beforehand, or else a tensor that nobody reads yet.

    Args:
        positions, counts: as in `Picked`.
    """
    if plan.select == "topk":
        return call.tokens_updated(plan.ratio(layer))
    if plan.select == "window" and is_exact(call):
        return positions.numel()
    return counts.sum()


def fitted(plan: OrthoRankConfig, call: Call, positions: Tensor, counts: Tensor) -> Tensor:
    """``positions`` without the columns that no row fills, so that the products of the layer are as few as they can be.

    How many a threshold selects is known on the device alone. Reading it makes no difference on a CPU; elsewhere the
    host waits, which pays in a long prompt. Inside a compiled graph, or one that is being captured, all columns stay:
    the kernels stop at -1, and the products of the empty rows go nowhere.
    """
    known = plan.select != "threshold" and call.tails is None
    if known or positions.shape[1] <= 1 or torch.compiler.is_compiling():
        return positions
    if positions.device.type != "cpu" and (call.tokens < WORTH_A_WAIT or _is_capturing(positions)):
        return positions
    return positions[:, : int(counts.max())]


def _is_capturing(positions: Tensor) -> bool:
    return positions.is_cuda and torch.cuda.is_current_stream_capturing()
