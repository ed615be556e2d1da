"""Layers without a state of their own, whose ``forward`` `kernels.kernelize` puts into a model's modules."""

from torch import Tensor, nn

from orthorank_kernels.ops.activation import silu_and_mul
from orthorank_kernels.ops.norm_score import rms_norm_score


class RMSNorm(nn.Module):
    """For modules like Llama's, with ``weight [hidden]`` and ``variance_epsilon``; ``[..., hidden]`` in and out."""

    can_torch_compile: bool = True
    has_backward: bool = True

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        rows = hidden_states.reshape(1, -1, hidden_states.shape[-1])
        normed = rms_norm_score(rows, self.weight, self.variance_epsilon).normed
        assert normed is not None  # it is written unless it is left out by name
        return normed.view(hidden_states.shape)


class SiluAndMul(nn.Module):
    """``[..., 2 * width]`` to ``[..., width]``: SiLU of the first half times the second."""

    can_torch_compile: bool = True
    has_backward: bool = True

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        return silu_and_mul(x.reshape(-1, width)).view(*x.shape[:-1], width // 2)


__all__ = ["RMSNorm", "SiluAndMul"]
