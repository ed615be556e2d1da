"""The k most orthogonal tokens of each row, in PyTorch.

Every token gets one integer that says when its turn comes; the k smallest are taken and sorted by position.
"""

import torch
from torch import Tensor

from orthorank_kernels.reference.scoring import rms_norm_score

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


def preference(scores: Tensor, begin: Tensor, end: Tensor, sink: Tensor, keep_last: int) -> Tensor:
    """When each token's turn comes, int64 ``[batch, tokens]``: a total order, positions included."""
    position = torch.arange(scores.shape[1], device=scores.device)
    bits = scores.detach().float().view(torch.int32).long()
    key = torch.where(bits < 0, -bits, bits + 2**31)  # ascends with the score; -0.0 and 0.0 meet at 2**31
    key = torch.where(scores.isnan(), NAN, key)
    if keep_last > 0:
        key = torch.where(position >= end - keep_last, end - 1 - position, key)
    key = torch.where(position == sink, SINK, key)
    key = torch.where((position < begin) | (position >= end), PADDING, key)
    return (key << POSITION_BITS) | position


def select_tokens(
    scores: Tensor,
    k: int,
    row_k: Tensor | None,
    width: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    keep_last: int,
) -> tuple[Tensor, Tensor]:
    """``positions [batch, width]`` and ``counts [batch]``; `orthorank_kernels.select_tokens`.

    The number of tokens that a row selects is the smallest of ``k``, ``row_k`` (one per row), ``width`` and the
    row's number of valid tokens.
    """
    tokens = scores.shape[1]
    begin, end = valid_range(scores, starts, lengths)
    sink = begin if sink_positions is None else sink_positions.long().unsqueeze(1)
    counts = (end - begin).clamp(max=min(k, width))  # [batch, 1]
    if row_k is not None:
        counts = torch.minimum(counts, row_k.long().unsqueeze(1)).clamp(min=0)
    candidates = min(width, tokens)
    order = preference(scores, begin, end, sink, keep_last).topk(candidates, dim=1, largest=False, sorted=True).values
    positions = order & (2**POSITION_BITS - 1)
    taken = torch.arange(candidates, device=scores.device) < counts
    positions = torch.where(taken, positions, tokens).sort(dim=1).values  # the tokens not taken move to the end
    positions = torch.where(positions == tokens, -1, positions)
    positions = torch.nn.functional.pad(positions, (0, width - candidates), value=-1)
    return positions.int(), counts.squeeze(1).int()


def rms_norm_select(
    hidden_states: Tensor,
    weight: Tensor,
    eps: float,
    k: int,
    row_k: Tensor | None,
    width: int,
    sink: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    keep_last: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two above, one after the other; `orthorank_kernels.rms_norm_select`."""
    normed, scores, _ = rms_norm_score(hidden_states, weight, eps, sink=sink, starts=starts)
    positions, counts = select_tokens(scores, k, row_k, width, starts, lengths, sink_positions, keep_last)
    return normed, scores, positions, counts
