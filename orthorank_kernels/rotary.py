"""Rotary position embedding of tokens that were gathered out of their sequence."""

import torch

from orthorank_kernels import _checks, _library, dispatch
from orthorank_kernels._layout import empty_ordered_like
from orthorank_kernels.reference import rotary as reference


def apply_rotary_at(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Rotate queries or keys by the angles of their original positions (Su et al. 2021, RoFormer, equation 34).

    Entry ``i`` of batch row ``b`` is rotated by ``cos[b, positions[b, i]]`` and ``sin[b, positions[b, i]]``. The
    pairing is half-split, as in Hugging Face's ``rotate_half``: element ``j`` turns with element ``j + rotary_dim/2``.
    Computed in float32 and rounded once, so a bfloat16 result is closer to the exact one than when each product and
    the sum are rounded.

    Args:
        x: ``[batch, heads, selected, head_dim]``, floating point. Any strides, the last one 1: the transposed view of
            a projection's output is the normal case.
        cos: ``[batch or 1, tokens, rotary_dim]``, floating point, as Hugging Face's rotary modules return it: the
            second half of the last dimension repeats the first (only the first is read). ``rotary_dim`` is even and at
            most ``head_dim``; elements of ``x`` from there on pass through. Any strides, the last one 1.
        sin: like ``cos``.
        positions: int32 ``[batch, selected]``, indices into the token axis of ``cos``; -1 gives zeros. None: ``x``
            holds all tokens, in order. A position past the token axis is an IndexError on a CPU, undefined on a GPU.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        Shape and dtype of ``x``; dense, with the dimensions in the same order in memory as in ``x``. Differentiable
        in ``x``, ``cos`` and ``sin``.

    Raises:
        TypeError, ValueError: an argument has the wrong type, dtype, shape, stride or device.
        BackendError: ``backend="triton"`` cannot run here.

    >>> angle = torch.tensor([0.0, torch.pi / 2]).reshape(1, 2, 1).expand(1, 2, 4)
    >>> x = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    >>> apply_rotary_at(x, angle.cos(), angle.sin(), torch.tensor([[1]], dtype=torch.int32)).round(decimals=3)
    tensor([[[[-3., -4.,  1.,  2.]]]])
    """
    _check(x, cos, sin, positions)
    return dispatch.run(
        _APPLY_ROTARY_AT,
        (x, cos, sin, positions),
        backend=backend,
        device=x.device,
    )


def _check(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor | None) -> None:
    _checks.tensor("x", x, "[batch, heads, selected, head_dim]")
    batch, _, selected, head_dim = x.shape
    _checks.tensor("cos", cos, "[batch or 1, tokens, rotary_dim]")
    _checks.tensor("sin", sin, "[batch or 1, tokens, rotary_dim]")
    _checks.shape("sin", sin, cos.shape, "the shape of cos")
    _checks.same_dtype("cos", cos, sin=sin)
    _checks.same_device("x", x, cos=cos, sin=sin)
    _checks.unit_last_stride(x=x, cos=cos, sin=sin)
    rotary_dim = cos.shape[2]
    if cos.shape[0] not in (1, batch):
        raise ValueError(f"cos has shape {list(cos.shape)}; its first dimension must be the batch of x, {batch}, or 1")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"cos has shape {list(cos.shape)}; its last dimension, rotary_dim, must be even, "
            f"above 0 and at most the head_dim of x, {head_dim}"
        )
    if positions is None:
        if cos.shape[1] != selected:
            raise ValueError(
                f"cos has {cos.shape[1]} tokens and x {selected}; pass positions to say which tokens x holds"
            )
        return
    _checks.positions(positions, batch, x)
    _checks.shape("positions", positions, (batch, selected), "the shape of x")
    _checks.unit_last_stride(positions=positions)


_APPLY_ROTARY_AT = _library.define(
    "apply_rotary_at(Tensor x, Tensor cos, Tensor sin, Tensor? positions=None) -> Tensor",
    cpu=reference.apply_rotary_at,
    triton="rotary.apply_rotary_at",
    fake=lambda x, cos, sin, positions=None: empty_ordered_like(x),
)
