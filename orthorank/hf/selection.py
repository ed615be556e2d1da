"""Which tokens of a call a layer updates, once they are ranked: so many, so many of each window, or all below a number.

The kernels select from whole rows and force tokens at a row's end alone. What goes beyond that is brought into their
terms here: forced tokens elsewhere get rank -inf, and windows become packed sequences. Nothing here waits for a device,
except `fitted`, which says when.

Top-k inside windows of W tokens of each row: windows at fixed places, so that no chunk of a prompt moves them.

A token's window is its place in the row, cached tokens counted and padding not, divided by W. Each window selects its
own k; so does the part of a window that a call holds, where a call ends or begins inside one. For the kernels, every
window is one packed sequence. Row i of a call turns into these, one after the other:

    padding before it   0 of them are selected
    window 1, 2, ...    k of each, clipped to the row's prompt
    what follows it     the tokens that are generated, all of them
"""

import dataclasses
import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthorank.calls.context import ForwardContext, Windows
from orthorank.config import OrthoRankConfig
from orthorank_kernels import keep_count, select_tokens
from orthorank_kernels.layout import selection_workspace

WORTH_A_WAIT = 256  # tokens of a call, from which dropping empty columns saves more time than reading a count takes


class LayerPlan(OrthoRankConfig):
    """``plan`` for ``layer`` alone: what is asked of it by number is answered without looking at the number.

    A compiled graph would take the number for a constant. So layers that are compiled one by one, and have the same
    ratio, share a graph.

    Example:
        >>> of_2 = LayerPlan(OrthoRankConfig(layers=[1, 2], keep_ratio=0.5, keep_ratios={2: 0.25}), 2)
        >>> of_2.ratio(2), of_2.criterion
        (0.25, 'orthogonal')
    """

    def __init__(self, plan: OrthoRankConfig, layer: int) -> None:
        self.__dict__.update(vars(plan))
        self.own_ratio, self.own_threshold = plan.ratio(layer), plan.thresholds.get(layer)

    def ratio(self, layer: int) -> float:
        """The layer's share of tokens."""
        return self.own_ratio


def prepared(call: ForwardContext, plan: OrthoRankConfig, device: torch.device) -> ForwardContext:
    """``call`` with what every selecting layer of ``plan`` would compute anew, on ``device``."""
    counted = call.tokens if plan.select == "topk" else 0  # other ways to select count no scores
    workspace = selection_workspace(call.batch, counted, device)
    call = dataclasses.replace(call, workspace=workspace, update_sink=plan.update_sink, multiple=plan.keep_multiple)
    if call.lengths is not None:
        call = dataclasses.replace(call, valid=call.lengths.sum())
    ratios = {plan.ratio(layer) for layer in plan.selecting}
    if plan.select_window is not None:
        windows = {ratio: windows_of(call, plan.select_window, ratio, device) for ratio in ratios}
        return dataclasses.replace(call, windows=windows)
    if plan.select == "threshold":
        return call
    return dataclasses.replace(call, counted={ratio: call.counted_for(ratio) for ratio in ratios})


def is_plain(plan: OrthoRankConfig, call: ForwardContext) -> bool:
    """Whether `request` says it all: whole rows, and forced tokens at their ends alone."""
    return plan.select != "window" and call.forced_at_end is not None


def request(plan: OrthoRankConfig, layer: int, call: ForwardContext) -> dict[str, Any]:
    """How ``plan`` selects in ``layer``, as arguments of `select_tokens`: k or threshold, keep_last and room."""
    forced = call.forced_at_end or 0
    if plan.select == "threshold":
        own = plan.own_threshold if isinstance(plan, LayerPlan) else plan.thresholds[layer]
        return {"threshold": own, "keep_last": forced, "max_selected": call.tokens}
    each, most = call.counts(plan.ratio(layer))
    return {"k": each, "keep_last": forced, "max_selected": most}


def pick(
    plan: OrthoRankConfig, layer: int, call: ForwardContext, ranks: Tensor, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The tokens that ``plan`` selects in ``layer`` by their ``ranks``.

    Args:
        ranks: float32 ``[batch, tokens]``, the smallest first; sinks: as ``sink_positions`` of `select_tokens`.

    Returns:
        Positions, int32 ``[batch, most]``, ascending, -1 past a row's count; counts, int32 ``[batch]``.
    """
    if not is_plain(plan, call):
        ranks = torch.where(call.forced_mask(ranks.device), -torch.inf, ranks)
    if plan.select == "window":
        return _pick_in_windows(plan, layer, call, ranks)
    chosen = select_tokens(
        ranks,
        **request(plan, layer, call),
        starts=call.starts,
        lengths=call.lengths,
        sink_positions=sinks,
    )
    return chosen.positions, chosen.counts


def count_of(
    plan: OrthoRankConfig, layer: int, call: ForwardContext, positions: Tensor, counts: Tensor
) -> int | Tensor:
    """How many tokens are updated in all: an int where it is known beforehand, or else a tensor that is not read yet.

    Args:
        positions, counts: as `pick` gives them.
    """
    if plan.select == "topk":
        return call.tokens_updated(plan.ratio(layer))
    if plan.select == "window" and is_exact(call):
        return positions.numel()
    return counts.sum()


def fitted(plan: OrthoRankConfig, call: ForwardContext, positions: Tensor, counts: Tensor) -> Tensor:
    """``positions`` without the columns that no row fills, so that the products of the layer are as few as they can be.

    How many a threshold selects is known on the device alone. Reading it makes no difference on a CPU; elsewhere the
    host waits, which pays in a long prompt. Inside a compiled graph, or one that is being captured, all columns stay:
    the kernels stop at -1, and the products of the empty rows go nowhere.
    """
    known = plan.select != "threshold" and call.tails is None
    if known or positions.shape[1] <= 1 or torch.compiler.is_compiling():
        return positions
    capturing = positions.is_cuda and torch.cuda.is_current_stream_capturing()
    if positions.device.type != "cpu" and (call.tokens < WORTH_A_WAIT or capturing):
        return positions
    return positions[:, : int(counts.max())]


def windows_of(call: ForwardContext, window: int, ratio: float, device: torch.device) -> Windows:
    """The windows of ``call``, computed where its tensors are: the host waits for nothing.

    Args:
        window: tokens of one; ratio: share of its tokens that each selects.
    """
    begin, end = _columns(call, device)  # [batch, 1] each, and so is all that follows with one number for each row
    prompt_end = end - (call.decode_tokens if call.tails is None else call.tails[:, None].long())
    prompt_end = torch.maximum(prompt_end, begin)
    first = (0 if call.key_starts is None else call.key_starts[:, None].long()) - call.past  # column of the row's first
    number = torch.arange(_most_windows(call, window), device=device)[None]
    edges = first + ((begin - first) // window + number) * window  # of window 1, 2, ...: [batch, windows]
    edges = torch.minimum(torch.maximum(edges, begin), prompt_end)
    edges = torch.cat([edges, prompt_end], dim=1)
    lengths = edges.diff(dim=1)
    left_out = call.sinks_left_out
    sink = torch.zeros_like(begin) if left_out is None else left_out[:, None].long()
    inside = (sink >= edges[:, :-1]) & (sink < edges[:, 1:])
    forced = (edges[:, 1:] - torch.maximum(edges[:, :-1], prompt_end - call.kept)).clamp(min=0)
    counts = _counts(lengths, ratio, forced, inside, call.update_sink)
    bounds = torch.cat([edges, end], dim=1) + call.tokens * torch.arange(call.batch, device=device)[:, None]
    padding = torch.zeros_like(begin)
    sinks = torch.where(inside & (not call.update_sink), sink - edges[:, :-1], -1)
    return Windows(
        pad(bounds.flatten(), (1, 0)).int(),
        torch.cat([padding, counts, end - prompt_end], dim=1).flatten().int(),
        torch.cat([padding - 1, sinks, padding - 1], dim=1).flatten().int(),
        _most(call, window, ratio),
    )


def _pick_in_windows(plan: OrthoRankConfig, layer: int, call: ForwardContext, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """`pick` in each window; the tokens that are selected in any case have rank -inf."""
    windows = call.windows.get(plan.ratio(layer))
    if windows is None:
        assert plan.select_window is not None  # a plan that selects in windows has their size
        windows = windows_of(call, plan.select_window, plan.ratio(layer), ranks.device)
    chosen = select_tokens(
        ranks.flatten(),
        windows.counts,
        cu_seqlens=windows.cu_seqlens,
        sink_positions=windows.sinks,
        max_selected=call.batch * windows.most,
    )
    counts = chosen.counts.view(call.batch, -1).sum(dim=1, dtype=torch.int32)
    rows = chosen.rows
    assert rows is not None  # the packed layout has them
    if is_exact(call):
        offsets = call.tokens * torch.arange(call.batch, dtype=torch.int32, device=rows.device)
        return rows.view(call.batch, windows.most) - offsets[:, None], counts
    return _unpacked(rows, counts, call.tokens, windows.most), counts


def is_exact(call: ForwardContext) -> bool:
    """Whether all rows select alike, and the host counts how many: without padding, outside compiled code.

    Counting goes from window to window, and would make one graph for each number of windows. In a graph there is room
    for as many tokens as a row may select, and what is left over is -1.
    """
    return call.lengths is None and not torch.compiler.is_compiling()


def _unpacked(rows: Tensor, counts: Tensor, tokens: int, most: int) -> Tensor:
    """Indices ``rows`` among all tokens as positions in rows of their own: ``[batch, most]``, -1 past each count."""
    batch = counts.shape[0]
    before = counts.cumsum(0) - counts  # selected tokens of the rows above
    row = rows.clamp(min=0).long() // tokens
    place = row * most + torch.arange(rows.shape[0], device=rows.device) - before.index_select(0, row)
    place = torch.where(rows < 0, batch * most, place)  # one place more, for what is not there
    positions = torch.full((batch * most + 1,), -1, dtype=torch.int32, device=rows.device)
    return positions.scatter(0, place, torch.where(rows < 0, -1, rows % tokens))[:-1].view(batch, most)


def _columns(call: ForwardContext, device: torch.device) -> tuple[Tensor, Tensor]:
    """First valid column of each row in the call and one past the last, int64 ``[batch, 1]``."""
    if call.starts is None or call.lengths is None:
        zeros = torch.zeros(call.batch, 1, dtype=torch.int64, device=device)
        return zeros, zeros + call.tokens
    begin = call.starts[:, None].long()
    return begin, begin + call.lengths[:, None]


def _counts(lengths: Tensor, ratio: float, forced: Tensor, inside: Tensor, update_sink: bool) -> Tensor:
    """`keep_count` of each window, with as many forced tokens as it holds: int32 like ``lengths``."""
    counts = keep_count(lengths, ratio)
    forced = forced + (inside & update_sink)
    most = lengths - (inside & (not update_sink)).long()
    return torch.where(forced > 0, torch.minimum(torch.maximum(counts, forced), most), counts)


def _most_windows(call: ForwardContext, window: int) -> int:
    """Windows that a row of the call can touch."""
    whole = (call.tokens + window - 1) // window
    return whole if is_exact(call) and call.past % window == 0 else whole + 1


def _most(call: ForwardContext, window: int, ratio: float) -> int:
    """The most tokens that a row can select; exactly that where `is_exact`."""
    decoded = call.decode_tokens if call.tails is None else 0
    if not is_exact(call):
        selected = math.trunc((ratio + 1e-6) * call.tokens + 2e-6)  # no window is empty, so there are no more of them
        forced = call.keep_last + int(call.update_sink)
        return call.tokens if call.tails is not None else min(call.tokens, selected + forced + decoded)
    total, prompt = decoded, call.prompt_tokens
    edges = [0, *range(window - call.past % window, prompt, window), prompt]
    for begin, end in pairwise(edges):
        forced = max(0, end - max(begin, prompt - call.keep_last))
        has_sink = call.first and begin == 0
        keep = forced + int(has_sink and call.update_sink)
        total += keep_count(end - begin, ratio, keep, sink_inside=has_sink and not call.update_sink)
    return total
