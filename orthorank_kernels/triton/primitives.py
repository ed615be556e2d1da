"""Small device functions that several kernels use."""

import triton
import triton.language as tl


@triton.jit
def rms_norm_row(
    x,  # [BLOCK] float32, zero past HIDDEN
    weight,  # [BLOCK] in the model's dtype
    eps,
    HIDDEN: tl.constexpr,
):
    """RMSNorm of one row in the dtype of ``weight``: float32 inside, rounded before and after the weight."""
    mean_square = tl.sum(x * x, 0) / HIDDEN
    normed = (x * tl.rsqrt(mean_square + eps)).to(weight.dtype)  # [BLOCK]
    return (normed.to(tl.float32) * weight.to(tl.float32)).to(weight.dtype)  # [BLOCK]


@triton.jit
def norm_row(
    x,  # [BLOCK] float32, zero past HIDDEN
    inside,  # [BLOCK] bool: columns < HIDDEN
    weight,  # [BLOCK] in the model's dtype, or None for ones
    bias,  # [BLOCK] likewise, or None for zeros
    eps,
    weight_offset,  # float32, added to the weight; read if HAS_OFFSET
    NORM: tl.constexpr,  # "rms" or "layer"
    HAS_OFFSET: tl.constexpr,
    HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The norm of one row in DTYPE, rounded where the models round.

    LayerNorm, and RMSNorm with a weight offset (Gemma), round once, at the end. RMSNorm without one rounds before and
    after the weight, as Llama does.
    """
    if NORM == "layer":
        x = tl.where(inside, x - tl.sum(x, 0) / HIDDEN, 0.0)  # [BLOCK]
    y = x * tl.rsqrt(tl.sum(x * x, 0) / HIDDEN + eps)  # [BLOCK]
    if weight is not None:
        if NORM == "rms" and not HAS_OFFSET:
            y = y.to(DTYPE).to(tl.float32)
        scale = weight.to(tl.float32)
        if HAS_OFFSET:
            scale += weight_offset
        y *= scale
    if bias is not None:
        y += bias.to(tl.float32)
    return y.to(DTYPE)


@triton.jit
def ascending_key(score):
    """uint32 that ascends with a float32 score, from 0x00800000 (-inf) to 0xFF800000 (+inf); -0.0 and 0.0 share one.

    Not for NaN.
    """
    bits = score.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) != 0, 0 - bits, bits | 0x80000000)
