"""RMSNorm and the sink score, in PyTorch.

normed_i = weight * (x_i / sqrt(mean(x_i^2) + eps))        score_i = |<sink, normed_i>|
"""

import torch
from torch import Tensor

from orthorank_kernels.reference.norms import rms_norm, wide


def rms_norm_score(
    hidden_states: Tensor, weight: Tensor, eps: float, sink: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``normed [batch, tokens, hidden]`` and ``scores [batch, tokens]``; `orthorank_kernels.rms_norm_score`."""
    normed = rms_norm(hidden_states, weight, eps).contiguous()
    batch, tokens, _ = normed.shape
    if tokens == 0:
        return normed, normed.new_zeros(batch, 0, dtype=wide(normed.dtype))
    if sink is None:
        sink = _first_valid(normed, starts)
    # The product is taken with the rounded values: they are what the projections and a stored sink see.
    values = normed.to(wide(normed.dtype))
    scores = torch.matmul(values, sink.to(values.dtype).unsqueeze(-1))  # [batch, tokens, 1]
    return normed, scores.squeeze(-1).abs()


def _first_valid(rows: Tensor, starts: Tensor | None) -> Tensor:
    if starts is None:
        return rows[:, 0]
    first = starts.clamp(0, rows.shape[1] - 1).long()
    return rows[torch.arange(rows.shape[0], device=rows.device), first]
