"""How a program of the attention kernel begins: its queries, rotated and scaled, and its softmax. Device functions."""

import triton
import triton.language as tl

from orthorank_kernels.triton.primitives import turn

LOG2_E = tl.constexpr(1.4426950408889634)
NOTHING = tl.constexpr(float("-inf"))
SMALLEST_POWER = tl.constexpr(2.0**-40)  # a masked score, which is a multiple of it, must stay below all others


@triton.jit
def starting_point(sinks_ptr, head, in_tile, split, BLOCK_M: tl.constexpr, SPLIT: tl.constexpr):
    """Sum of weights and largest score, in bits, before the first key: [BLOCK_M] each.

    A sink is a key of which only the weight counts, so it is where the softmax starts; of several splits, the first's.
    """
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], NOTHING, tl.float32)
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head, mask=in_tile, other=0.0).to(tl.float32) * LOG2_E
        if SPLIT:
            total = tl.where(split == 0, total + 1.0, total)
            peak = tl.where(split == 0, sink, peak)
        else:
            total += 1.0
            peak = sink
    return total, peak


@triton.jit
def turn_queries(
    q,  # [BLOCK_M, BLOCK_D]
    q_ptr,
    q_rows,  # [BLOCK_M]: where they were read, in numbers from q_ptr
    cos_ptr,  # of this batch row
    sin_ptr,
    position,  # [BLOCK_M]
    sees,  # [BLOCK_M]: of the others the tables may have no row, and nobody uses the result
    stride_cos_token,
    stride_sin_token,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The queries by the angles of their positions, as `apply_rotary_at_kernel` has them to the last bit.

    Halves: each element's other one is read, too, which the cache has by now. Interleaved: a thread has both.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    offs_d = tl.arange(0, BLOCK_D)
    some = sees[:, None]
    cos_rows = cos_ptr + (position.to(tl.int64) * stride_cos_token)[:, None]
    sin_rows = sin_ptr + (position.to(tl.int64) * stride_sin_token)[:, None]
    if INTERLEAVED:
        angle = tl.arange(0, BLOCK_D // 2)[None, :]
        mask = some & (angle < HALF)  # [BLOCK_M, BLOCK_D // 2]
        cos = tl.load(cos_rows + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_rows + angle, mask=mask, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(q.to(tl.float32), [BLOCK_M, BLOCK_D // 2, 2]))
        x1, x2 = turn(x1, x2, cos, sin)
        # Not `tl.join`: behind one, the compiler has the product of queries and keys read both as if they were bytes.
        even = (tl.arange(0, 2) == 0)[None, None, :]
        turned = tl.reshape(tl.where(even, x1[:, :, None], x2[:, :, None]), [BLOCK_M, BLOCK_D])
    else:
        # Neighbours stay neighbours, which the compiler cannot know: so many numbers are read at a time.
        TOGETHER: tl.constexpr = 16 if HALF % 16 == 0 else HALF & -HALF
        first = offs_d < HALF
        partner = tl.where(first, offs_d + HALF, offs_d - HALF)
        partner = tl.max_contiguous(tl.multiple_of(partner, TOGETHER), TOGETHER)[None, :]
        angle = tl.where(first, offs_d, offs_d - HALF)
        angle = tl.max_contiguous(tl.multiple_of(angle, TOGETHER), TOGETHER)[None, :]
        mask = some & (offs_d < ROTARY_DIM)[None, :]  # [BLOCK_M, BLOCK_D]
        cos = tl.load(cos_rows + angle, mask=mask, other=0.0).to(tl.float32)
        sin = tl.load(sin_rows + angle, mask=mask, other=0.0).to(tl.float32)
        other = tl.load(q_ptr + (q_rows[:, None] + partner), mask=mask, other=0.0).to(tl.float32)
        turned, _ = turn(q.to(tl.float32), other, cos, tl.where(first[None, :], sin, -sin))
    turned = turned.to(q.dtype)
    return turned if ROTARY_DIM == BLOCK_D else tl.where((offs_d < ROTARY_DIM)[None, :], turned, q)


@triton.jit
def scale_queries(q, to_bits, k_scale_ptr, kv_head, stride_k_scale, FP8: tl.constexpr):
    """Rows of q [BLOCK_M, BLOCK_D], and the factor from q k to bits: one number, with FP8 one for each row.

    Float16 holds fp8 numbers exactly and bfloat16 would take twice the instructions to make. So rows of bfloat16 are
    scaled into its range by a power of two, to less than 2: what is lost is less than 2^-24 of a row's largest number,
    or of 2^-40, whose products are nothing beside the scores of other rows.
    """
    if k_scale_ptr is not None:
        to_bits *= tl.load(k_scale_ptr + kv_head.to(tl.int64) * stride_k_scale).to(tl.float32)
    if FP8 != "":
        wide = q.to(tl.float32)
        power = (tl.max(tl.abs(wide), 1).to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        power = tl.maximum(power, SMALLEST_POWER)
        to_bits = power * to_bits
        wide = wide * (1.0 / power)[:, None]
        q = wide if q.dtype == tl.float32 else wide.to(tl.float16)
        if FP8 == "e4m3":
            to_bits *= 256.0
    return q, to_bits
