"""Norms over the last dimension, in float32 (float64 stays float64), rounded where the models round."""

import torch
from torch import Tensor


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums run in: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float = 0.0) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight``: as Llama rounds it, or with ``weight_offset`` as Gemma does.

    Llama rounds the normalised value to the input's dtype before the weight multiplies it in that dtype; Gemma
    multiplies by ``weight_offset + weight`` in float32 and rounds once.
    """
    exact = x.to(wide(x.dtype))
    normed = exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)
    if weight is None:
        return normed.to(x.dtype)
    if weight_offset:
        return (normed * (weight.to(normed.dtype) + weight_offset)).to(x.dtype)
    return weight * normed.to(x.dtype)


def normalise(
    x: Tensor, weight: Tensor | None, eps: float, norm: str, bias: Tensor | None = None, weight_offset: float = 0.0
) -> Tensor:
    """The norm called ``norm``: "rms", or "layer", ``(x - mean) / sqrt(var + eps) * weight + bias``."""
    if norm == "rms":
        return rms_norm(x, weight, eps, weight_offset)
    exact = x.to(wide(x.dtype))
    weight = None if weight is None else weight.to(exact.dtype) + weight_offset
    bias = None if bias is None else bias.to(exact.dtype)
    return torch.nn.functional.layer_norm(exact, x.shape[-1:], weight, bias, eps).to(x.dtype)
