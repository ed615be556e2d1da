"""The gate of the MLP: SiLU of one projection times another, in one pass."""

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.pytorch import activation as pytorch
from orthorank_kernels.reference import rows as reference


@planned
def silu_and_mul(
    gate: Tensor,
    up: Tensor | None = None,
    *,
    positions: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """``silu(gate) * up``, with ``silu(x) = x / (1 + exp(-x))``: the middle of a SwiGLU MLP (Shazeer 2020).

    Computed in float32; SiLU and product are each rounded to the dtype, as in Hugging Face's MLPs.

    Args:
        gate: ``[batch, selected, width]`` or packed ``[selected, width]``, floating point; or, without ``up``, the
            output of a merged projection, ``[..., 2 * width]``: gate first, up behind it. Any strides, the last one 1.
        up: shape and dtype of ``gate``. Any strides, the last one 1.
        positions: int32 ``[batch, selected]`` or ``[selected]``; rows where it is -1 become zeros and are not read.
            None: all rows count.
        out: where to write the result: its shape and dtype, contiguous; it may be ``gate`` or ``up`` itself. None: new
            memory.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        ``[batch, selected, width]`` or ``[selected, width]``, contiguous; ``out`` if it is given. Differentiable in
        ``gate`` and ``up``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        BackendError: ``backend="triton"`` cannot run here, or ``out`` is given and an input requires grad.

    >>> gate, up = torch.tensor([[0.0, 1.0, -1.0]]), torch.tensor([[5.0, 2.0, 2.0]])
    >>> silu_and_mul(gate, up)
    tensor([[ 0.0000,  1.4621, -0.5379]])
    >>> silu_and_mul(torch.cat([gate, up], dim=-1))
    tensor([[ 0.0000,  1.4621, -0.5379]])
    """
    packed = isinstance(gate, Tensor) and gate.dim() == 2
    layout = "[selected, width]" if packed else "[batch, selected, width]"
    _checks.tensor("gate", gate, layout, packed="packed [selected, width]")
    if up is None:
        if gate.shape[-1] % 2:
            raise ValueError(f"gate has shape {list(gate.shape)}; its last dimension, gate and up, must be even")
        width = gate.shape[-1] // 2
        gate, up = gate.narrow(-1, 0, width), gate.narrow(-1, width, width)
    else:
        _checks.tensor("up", up, layout)
        _checks.shape("up", up, gate.shape, "the shape of gate")
        _checks.same_dtype("gate", gate, up=up)
        _checks.same_device("gate", gate, up=up)
    _checks.unit_last_stride(gate=gate, up=up)
    if positions is not None:
        _checks.positions(positions, None if packed else gate.shape[0], gate)
        _checks.shape("positions", positions, gate.shape[:-1], "the shape of gate")
    if out is not None:
        _checks.output("out", out, gate.shape, gate.dtype, gate)
    tensors = [None if t is None else t.unsqueeze(0) if packed else t for t in (gate, up, positions, out)]
    result = dispatch.run(
        _SILU_AND_MUL,
        tuple(tensors[:3]),
        backend=backend,
        device=gate.device,
        out=None if out is None else (tensors[3],),
    )
    if out is not None:
        return out
    return result.squeeze(0) if packed else result


_SILU_AND_MUL = _library.define(
    pytorch.silu_and_mul,
    reference=reference.silu_and_mul,
    triton="activation.silu_and_mul",
    fake=lambda call: torch.empty_like(call.gate, memory_format=torch.contiguous_format),
    outputs=("out",),
    aliases=("gate", "up"),
)
