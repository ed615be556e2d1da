"""The selected tokens of each row or packed sequence, in PyTorch.

For the k most orthogonal, every token gets one integer that says when its turn comes; the k smallest are taken. By a
threshold, every token is looked at alone. Either way the taken ones are then written one after the other.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

# 32-bit preferences, smallest first. The last `keep_last` tokens take 0, 1, 2, ... from the end; a score takes the
# place of its float32 value, from -inf at 0x00800000 to +inf at 0xFF800000; the rest stand above +inf.
NAN, SINK, PADDING = 0xFFFFFFFD, 0xFFFFFFFE, 0xFFFFFFFF
POSITION_BITS = 31


def valid_range(scores: Tensor, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """First valid token of each row and one past the last, int64 ``[batch, 1]``, inside the row whatever the input."""
    batch, tokens = scores.shape
    zero = torch.zeros(batch, 1, dtype=torch.int64, device=scores.device)
    begin = zero if starts is None else starts.long().unsqueeze(1).clamp(0, tokens)
    if lengths is None:
        return begin, zero + tokens
    return begin, begin + torch.minimum(lengths.long().unsqueeze(1).clamp(min=0), tokens - begin)


def sequences(tokens: int, cu_seqlens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token of the packed axis, int64 ``[tokens]``: its sequence, where that begins, and one past its end.

    Tokens that belong to no sequence get an empty one.
    """
    bounds = cu_seqlens.long()
    token = torch.arange(tokens, device=cu_seqlens.device)
    after = torch.searchsorted(bounds, token, right=True)  # the first bound past the token
    bounds = pad(bounds, (0, 1), value=0)
    return (after - 1).clamp(max=max(cu_seqlens.shape[0] - 2, 0)), bounds[after - 1], bounds[after]


def preference(scores: Tensor, begin: Tensor, end: Tensor, sink: Tensor, keep_last: int) -> Tensor:
    """When each token's turn comes, int64 like ``scores``: a total order, positions included."""
    position = torch.arange(scores.shape[-1], device=scores.device)
    bits = scores.detach().float().resolve_neg().view(torch.int32).long()
    key = torch.where(bits < 0, -bits, bits + 2**31)  # ascends with the score; -0.0 and 0.0 meet at 2**31
    key = torch.where(scores.isnan(), NAN, key)
    if keep_last > 0:
        key = torch.where(position >= end - keep_last, end - 1 - position, key)
    key = torch.where(position == sink, SINK, key)
    key = torch.where((position < begin) | (position >= end), PADDING, key)
    return (key << POSITION_BITS) | position


def below(scores: Tensor, threshold: Tensor, begin: Tensor, end: Tensor, sink: Tensor, keep_last: int) -> Tensor:
    """Which tokens a threshold selects: the valid ones that score less, and the last ``keep_last``; never the sink."""
    position = torch.arange(scores.shape[-1], device=scores.device)
    wanted = (scores.detach().float() < threshold) | (position >= end - keep_last)
    return wanted & (position != sink) & (position >= begin) & (position < end)


def written(taken: Tensor, width: int) -> Tensor:
    """Indices of the first ``width`` tokens that are ``taken [..., tokens]``, ascending: ``[..., width]``, -1 past."""
    tokens = taken.shape[-1]
    index = torch.arange(tokens, device=taken.device)
    index = torch.where(taken, index, tokens).sort(dim=-1).values[..., :width]  # those not taken move to the end
    return pad(torch.where(index == tokens, -1, index), (0, width - min(width, tokens)), value=-1)


def select_tokens(
    scores: Tensor,
    k: int | None,
    seq_k: Tensor | None,
    threshold: float | None,
    seq_threshold: Tensor | None,
    width: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    cu_seqlens: Tensor | None,
    position_offsets: Tensor | None,
    keep_last: int,
    largest: bool = False,
    relative: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``positions``, ``counts``, ``rows`` and ``cu_selected``; `orthorank_kernels.select_tokens`.

    ``k`` None selects by ``threshold``, or by ``seq_threshold``, one for each row. Otherwise a row selects so many: the
    smallest of ``k``, ``seq_k`` (one per row), the room left in ``width`` and its number of valid tokens.
    """
    if threshold is not None:
        rows = scores.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        seq_threshold = torch.full((rows,), threshold, dtype=torch.float64, device=scores.device).float()
    if cu_seqlens is not None:
        return _select_packed(
            scores, k, seq_k, seq_threshold, width, sink_positions, cu_seqlens, position_offsets, keep_last
        )
    begin, end = valid_range(scores, starts, lengths)
    sink = begin if sink_positions is None else sink_positions.long().unsqueeze(1)
    if largest:
        scores, sink = -scores, sink if sink_positions is not None else torch.full_like(begin, -1)
    if seq_threshold is not None:
        taken = below(scores, seq_threshold.unsqueeze(1), begin, end, sink, keep_last)
        counts = taken.sum(1).clamp(max=width)
    else:
        counts = _counts((end - begin).squeeze(1), k, seq_k).clamp(max=width)
        order = preference(scores, begin, end, sink, keep_last).argsort(dim=1)
        rank = torch.arange(scores.shape[1], device=scores.device)
        taken = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, rank < counts.unsqueeze(1))
    none = torch.zeros(2, 0, dtype=torch.int32, device=scores.device)
    positions = written(taken, width)
    if relative:
        positions = torch.where(positions < 0, -1, positions - begin)
    return positions.int(), counts.int(), none[0], none[1].clone()


def _counts(n_valid: Tensor, k: int | None, seq_k: Tensor | None) -> Tensor:
    counts = n_valid.clamp(max=k)
    return counts if seq_k is None else torch.minimum(counts, seq_k.long().clamp(min=0))


def _select_packed(
    scores: Tensor,
    k: int | None,
    seq_k: Tensor | None,
    seq_threshold: Tensor | None,
    width: int,
    sink_positions: Tensor | None,
    cu_seqlens: Tensor,
    position_offsets: Tensor | None,
    keep_last: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, bounds = scores.shape[0], cu_seqlens.long()
    if bounds.shape[0] == 1 or tokens == 0:
        rows = torch.full((width,), -1, dtype=torch.int32, device=scores.device)
        return rows, torch.zeros_like(cu_seqlens[1:]), rows.clone(), torch.zeros_like(cu_seqlens)
    seq, begin, end = sequences(tokens, cu_seqlens)
    token, starts = torch.arange(tokens, device=scores.device), bounds[:-1]
    offsets = torch.zeros_like(starts) if position_offsets is None else position_offsets.long()
    if sink_positions is None:
        sink = torch.where(offsets == 0, starts, -1)
    else:
        sink = torch.where(sink_positions < 0, -1, starts + sink_positions)
    if seq_threshold is not None:
        taken = below(scores, seq_threshold[seq], begin, end, sink[seq], keep_last)
    else:
        ends = _counts(bounds.diff(), k, seq_k).cumsum(0).clamp(max=width)
        counts = ends.diff(prepend=ends.new_zeros(1))
        order = preference(scores, begin, end, sink[seq], keep_last).argsort()
        order = order[seq[order].argsort(stable=True)]  # by sequence, and inside each by preference
        rank = token - starts[seq[order]]
        taken = torch.zeros_like(order, dtype=torch.bool).scatter(0, order, rank < counts[seq[order]])
    rows = written(taken, width)
    positions = torch.where(rows < 0, -1, (token - begin + offsets[seq])[rows.clamp(min=0)])
    cu_selected = pad(taken.cumsum(0), (1, 0))[bounds].clamp(max=width)
    return positions.int(), cu_selected.diff().int(), rows.int(), cu_selected.int()
