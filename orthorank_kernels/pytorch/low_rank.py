"""A low-rank map added to hidden states, in PyTorch.

    out[b, t] = hidden_states[b, t] + up low[b, t] + bias

for every valid token but the sink; others stay as they are. Products and sums in float32 (float64 stays float64), the
sum rounded once.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from orthorank_kernels.pytorch.selection import sequences, valid_range


def add_low_rank(
    hidden_states: Tensor,
    low: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    changes = changing(low, starts, lengths, sink_positions, cu_seqlens)[..., None]
    low = low.masked_fill(~changes, 0)  # what padding holds may be NaN, and would reach the gradient of up
    added = linear(low.to(dtype), up.to(dtype), None if bias is None else bias.to(dtype))
    result = (hidden_states.to(dtype) + added).to(hidden_states.dtype)
    return torch.where(changes, result, hidden_states).contiguous()


def changing(
    low: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Which tokens are neither sinks nor padding: bool ``[batch, tokens]``."""
    token = torch.arange(low.shape[1], device=low.device)[None]  # [1, tokens]
    if cu_seqlens is None:
        begin, end = valid_range(low[..., 0], starts, lengths)
        sink = begin if sink_positions is None else sink_positions[:, None]
    else:
        sequence, begin, end = sequences(low.shape[1], cu_seqlens)
        sink = begin
        if sink_positions is not None and len(sink_positions):
            sink = begin + sink_positions[sequence]  # before the sequence, where there is none
    return (token >= begin) & (token < end) & (token != sink)
