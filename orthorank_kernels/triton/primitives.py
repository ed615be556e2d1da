"""Small device functions that several kernels use, and what their launchers refuse alike."""

import torch
import triton
import triton.language as tl


@triton.jit
def add_scaled(row, addend, scale):
    """row + scale * addend in the dtype of ``row``; the product is rounded to it, too, as the models do."""
    product = (addend.to(tl.float32) * scale).to(row.dtype)
    return (row.to(tl.float32) + product.to(tl.float32)).to(row.dtype)


@triton.jit
def turn(x1, x2, cos, sin):
    """Pairs of elements, float32, turned by an angle.

    Which product is fused with the sum is said here, else a compiler would choose, for each kernel anew.
    """
    return tl.fma(x1, cos, -(x2 * sin)), tl.fma(x2, cos, x1 * sin)


@triton.jit
def norm_row(
    x,  # [BLOCK] float32, zero past HIDDEN
    weight,  # [BLOCK] or None, zero past HIDDEN
    bias,  # [BLOCK] or None, zero past HIDDEN
    inside,  # [BLOCK]: where a channel is below HIDDEN
    eps,
    dtype: tl.constexpr,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """One row normed, in ``dtype``: ``NORM`` is "rms", "layer" or "identity", ``OFFSET`` is added to the weight.

    float32 inside. Llama's norm ("rms" without an offset) rounds before the weight too, the others only at the end.
    """
    if NORM == "layer":
        x = tl.where(inside, x - tl.sum(x, 0) / HIDDEN, 0.0)
    if NORM != "identity":
        x *= tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)
        if NORM == "rms" and OFFSET == 0:
            x = x.to(dtype).to(tl.float32)
        if weight is not None:
            weight = weight.to(tl.float32)
            if OFFSET != 0:
                weight += OFFSET
            x *= weight
        if bias is not None:
            x += bias.to(tl.float32)
    return x.to(dtype)  # [BLOCK]


@triton.jit
def ascending_key(score):
    """uint32 that ascends with a float32 score, from 0x00800000 (-inf) to 0xFF800000 (+inf); -0.0 and 0.0 share one.

    Not for NaN.
    """
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, 0 - bits, bits | 0x80000000)


def refuse_float64(name: str, x: torch.Tensor) -> None:
    if x.dtype == torch.float64:
        raise TypeError(
            f"{name} has dtype float64; the Triton kernel takes float32, float16 and bfloat16: "
            'convert it with .float(), or use backend="torch"'
        )
