"""Norms over the last dimension, in PyTorch, rounded where the models round.

rms:    y = x / sqrt(mean(x^2) + eps) * weight            layer:    y = (x - mean) / sqrt(var + eps) * weight + bias
"""

import torch
from torch import Tensor

NORMS = ("rms", "layer")


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0) -> Tensor:
    """RMSNorm as Llama rounds it, or with ``weight_offset`` as Gemma does.

    float32 inside. Llama rounds the normalised value to the input's dtype before the weight multiplies it in that
    dtype; Gemma multiplies by ``weight_offset + weight`` in float32 and rounds once.
    """
    exact = x.to(wide(x.dtype))
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if weight_offset:
        return (normed * (weight.to(normed.dtype) + weight_offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, eps: float, bias: Tensor | None, weight_offset: float = 0.0) -> Tensor:
    """LayerNorm: float32 inside, rounded once."""
    exact = x.to(wide(x.dtype))
    if weight is not None:
        weight = weight.to(exact.dtype) + weight_offset
    if bias is not None:
        bias = bias.to(exact.dtype)
    return torch.nn.functional.layer_norm(exact, x.shape[-1:], weight, bias, eps).to(x.dtype)


def normalise(
    x: Tensor, weight: Tensor | None, eps: float, norm: str, bias: Tensor | None = None, weight_offset: float = 0.0
) -> Tensor:
    """The norm called ``norm``, one of `NORMS`."""
    if norm == "layer":
        return layer_norm(x, weight, eps, bias, weight_offset)
    return rms_norm(x, weight, eps, weight_offset)
