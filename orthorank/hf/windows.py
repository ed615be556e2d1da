"""Top-k inside windows of W tokens of each row: windows at fixed places, so that no chunk of a prompt moves them.

A token's window is its place in the row, cached tokens counted and padding not, divided by W. Each window selects its
own k; so does the part of a window that a call holds, where a call ends or begins inside one. For the kernels, every
window is one packed sequence. Row i of a call turns into these, one after the other:

    padding before it   0 of them are selected
    window 1, 2, ...    k of each, clipped to the row's prompt
    what follows it     the tokens that are generated, all of them
"""

import math
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from orthorank.calls.call import Call, Windows
from orthorank.config import OrthoRankConfig
from orthorank_kernels import keep_count, select_tokens


def windows_by_ratio(plan: OrthoRankConfig, call: Call, device: torch.device) -> dict[float, Windows]:
    """The windows of ``call`` at each ratio of ``plan``, once for all layers."""
    ratios = {plan.ratio(layer) for layer in plan.selecting}
    return {ratio: windows_of(call, _size(plan), ratio, device) for ratio in ratios}


def windows_of(call: Call, window: int, ratio: float, device: torch.device) -> Windows:
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
    sink = torch.zeros_like(begin) if call.sink_positions is None else call.sink_positions[:, None].long()
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


def select_in_windows(plan: OrthoRankConfig, layer: int, call: Call, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens of smallest rank in each window: positions int32 ``[batch, most]`` and counts ``[batch]``.

    Args:
        ranks: float32 ``[batch, tokens]``; the tokens that are selected in any case have -inf.
    """
    ratio = plan.ratio(layer)
    windows = call.windows.get(ratio)
    if windows is None:
        windows = windows_of(call, _size(plan), ratio, ranks.device)
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


def is_exact(call: Call) -> bool:
    """Whether all rows select alike, and the host counts how many: without padding, outside compiled code.

    Counting goes from window to window, and would make one graph for each number of windows. In a graph there is room
    for as many tokens as a row may select, and what is left over is -1.
    """
    return call.lengths is None and not torch.compiler.is_compiling()


def _size(plan: OrthoRankConfig) -> int:
    assert plan.select_window is not None  # a plan that selects in windows has their size
    return plan.select_window


def _unpacked(rows: Tensor, counts: Tensor, tokens: int, most: int) -> Tensor:
    """Indices ``rows`` among all tokens as positions in rows of their own: ``[batch, most]``, -1 past each count."""
    batch = counts.shape[0]
    before = counts.cumsum(0) - counts  # selected tokens of the rows above
    row = rows.clamp(min=0).long() // tokens
    place = row * most + torch.arange(len(rows), device=rows.device) - before[row]
    place = torch.where(rows < 0, batch * most, place)  # one place more, for what is not there
    positions = torch.full((batch * most + 1,), -1, dtype=torch.int32, device=rows.device)
    return positions.scatter(0, place, torch.where(rows < 0, -1, rows % tokens))[:-1].view(batch, most)


def _columns(call: Call, device: torch.device) -> tuple[Tensor, Tensor]:
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


def _most_windows(call: Call, window: int) -> int:
    """Windows that a row of the call can touch."""
    whole = (call.tokens + window - 1) // window
    return whole if is_exact(call) and call.past % window == 0 else whole + 1


def _most(call: Call, window: int, ratio: float) -> int:
    """The most tokens that a row can select; exactly that where `is_exact`."""
    decoded = call.decode_tokens if call.tails is None else 0
    if not is_exact(call):
        selected = math.floor((ratio + 1e-6) * call.tokens + 2e-6)  # no window is empty, so there are no more of them
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
