"""Gather, add and norm, in PyTorch.

    residual[b, i] = hidden_states[b, positions[b, i]] + scale * addend[b, i];        normed = norm(residual)

Zeros in both where positions is -1.
"""

import torch

from orthorank_kernels.pytorch.rows import scaled, take
from orthorank_kernels.reference.norms import normalise, rms_norm


def gather_add_rms_norm(
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    addend: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norm: str = "rms",
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    scale: float = 1.0,
    addend_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if addend_weight is not None:
        addend = rms_norm(addend, addend_weight, eps, weight_offset)
    missing = (positions < 0)[..., None]
    residual = take(hidden_states, positions).add_(scaled(addend, scale)).masked_fill_(missing, 0)
    if norm == "identity":
        return residual, residual.new_empty(0)
    normed = normalise(residual, weight, eps, norm, bias, weight_offset)
    return residual, normed if bias is None else normed.masked_fill(missing, 0)
