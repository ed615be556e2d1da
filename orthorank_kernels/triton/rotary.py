"""Rotary position embedding at given positions.

    out1 = x1 * cos - x2 * sin;   out2 = x2 * cos + x1 * sin

x, out [batch, heads, selected, head_dim]; cos, sin [batch or 1, tokens, rotary_dim], of which the first half is read;
positions int32 [batch, selected], -1 = missing, or None. x1 and x2 are the halves of the first rotary_dim elements of
a head, or interleaved its even and odd elements; the rest is copied. The packed layout comes as a batch of one. The
grid is (selected, batch), so a batch is at most 65,535. Computed in float32, so float64 is not supported.

DESIGN. Bytes: x once each way, the angles of a token once (half a row of cos and of sin), its position: requested /
minimal 1.000; for 32 heads of 128 in bfloat16, 16,900 a token. Operations: 3 for each element, so memory is the bound
(0.4 operations a byte). One program rotates all heads of one token, at most 8 KiB of x in registers at a time, so the
angles are read once for all heads and no two programs share anything. 16 bytes of each half for a thread make every
access 128 bits wide (interleaved: 16 or 32 bytes of neighbouring pairs, split in registers). A missing entry reads
nothing: what is masked is the bound of a range, not each element, which would narrow the loads. A thread writes where
it read, so that out may be x.

Compiled in bfloat16 for sm_80 / sm_90 / sm_100 / gfx942, without spills, shared memory or atomics:

    32 heads of 128                     48 / 52 / 48 / 46 registers, 96 % of load bytes 128 bits wide
    32 heads of 64                      32 / 32 / 32 / 28
    32 heads of 128, half, interleaved  36 / 31 / 34 / 26, 76 %: the pairs' angles are 8 bytes a thread

Not taken: a program for each head, which would read the angles once for each (by the byte model 1.48 times the fewest
bytes for 32 heads of 128); a mask for each element of a missing entry, which loads 32 bits at a time.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.layout import empty_ordered_like
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import launch, next_power_of_2, target_of
from orthorank_kernels.triton.primitives import refuse_float64, turn
from orthorank_kernels.triton.strides import strides, table_strides


@triton.jit
def rotate_heads(
    x,  # [BLOCK_HEADS, 1]: where each head begins
    out,  # [BLOCK_HEADS, 1]: where its rotated elements go; may be x
    cos,  # [1 or BLOCK_HEADS, BLOCK_HALF] float32
    sin,  # [1 or BLOCK_HEADS, BLOCK_HALF] float32
    heads,  # [BLOCK_HEADS, 1]: their numbers
    n_read,  # heads from there on are zeros
    n_written,  # and from there on none is written
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    """Some heads of one token rotated by its angles, from memory to memory. Elements past ROTARY_DIM are copied."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    BLOCK_HEADS: tl.constexpr = heads.shape[0]
    dtype: tl.constexpr = out.dtype.element_ty
    if INTERLEAVED:
        pair = tl.arange(0, 2 * BLOCK_HALF)[None, :]  # [1, 2 * BLOCK_HALF]: both elements of each pair
        in_pair = pair < ROTARY_DIM
        both = tl.load(x + pair, mask=(heads < n_read) & in_pair, other=0.0).to(tl.float32)
        x1, x2 = tl.split(tl.reshape(both, [BLOCK_HEADS, BLOCK_HALF, 2]))  # [BLOCK_HEADS, BLOCK_HALF]
        x1, x2 = turn(x1, x2, cos, sin)
        turned = tl.reshape(tl.join(x1, x2), [BLOCK_HEADS, 2 * BLOCK_HALF])
        tl.store(out + pair, turned.to(dtype), mask=(heads < n_written) & in_pair)
    else:
        columns = tl.arange(0, BLOCK_HALF)[None, :]  # [1, BLOCK_HALF]
        read = (heads < n_read) & (columns < HALF)  # [BLOCK_HEADS, BLOCK_HALF]
        mask = (heads < n_written) & (columns < HALF)
        x1 = tl.load(x + columns, mask=read, other=0.0).to(tl.float32)
        x2 = tl.load(x + HALF + columns, mask=read, other=0.0).to(tl.float32)
        x1, x2 = turn(x1, x2, cos, sin)
        tl.store(out + columns, x1.to(dtype), mask=mask)
        tl.store(out + HALF + columns, x2.to(dtype), mask=mask)
    if ROTARY_DIM < HEAD_DIM:
        rest = ROTARY_DIM + tl.arange(0, BLOCK_REST)[None, :]  # [1, BLOCK_REST]
        in_rest = rest < HEAD_DIM
        kept = tl.load(x + rest, mask=(heads < n_read) & in_rest, other=0.0)  # [BLOCK_HEADS, BLOCK_REST]
        tl.store(out + rest, kept, mask=(heads < n_written) & in_rest)


@triton.jit(do_not_specialize=["stride_positions_batch"])
def apply_rotary_at_kernel(
    x_ptr,  # [batch, HEADS, selected, HEAD_DIM]
    stride_x_batch,
    stride_x_head,
    stride_x_entry,
    cos_ptr,  # [batch or 1, tokens, ROTARY_DIM]
    stride_cos_batch,
    stride_cos_token,
    sin_ptr,  # [batch or 1, tokens, ROTARY_DIM]
    stride_sin_batch,
    stride_sin_token,
    positions_ptr,  # [batch, selected], or None: all tokens, in order
    stride_positions_batch,
    out_ptr,  # [batch, HEADS, selected, HEAD_DIM]
    stride_out_batch,
    stride_out_head,
    stride_out_entry,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    position = entry
    if positions_ptr is not None:
        position = tl.load(positions_ptr + batch * stride_positions_batch + entry).to(tl.int64)
    # Bounds of what is read: a missing entry reads nothing and so becomes zeros.
    half_read = tl.where(position >= 0, ROTARY_DIM // 2, 0)
    heads_read = tl.where(position >= 0, HEADS, 0)
    x_ptr += batch * stride_x_batch + entry * stride_x_entry
    out_ptr += batch * stride_out_batch + entry * stride_out_entry

    columns = tl.arange(0, BLOCK_HALF)  # [BLOCK_HALF]
    cos_ptr += batch * stride_cos_batch + position * stride_cos_token
    sin_ptr += batch * stride_sin_batch + position * stride_sin_token
    cos = tl.load(cos_ptr + columns, mask=columns < half_read, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_HALF]
    sin = tl.load(sin_ptr + columns, mask=columns < half_read, other=0.0).to(tl.float32)[None, :]  # [1, BLOCK_HALF]

    for first_head in range(0, HEADS, BLOCK_HEADS):
        heads = first_head + tl.arange(0, BLOCK_HEADS)[:, None]  # [BLOCK_HEADS, 1]
        x = x_ptr + heads.to(tl.int64) * stride_x_head
        out = out_ptr + heads.to(tl.int64) * stride_out_head
        rotate_heads(
            x, out, cos, sin, heads, heads_read, HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_HALF, BLOCK_REST
        )


LARGEST_TOKEN = 8192  # bytes, of the kinds of problems


def launch_settings(heads: int, head_dim: int, rotary_dim: int, itemsize: int, target: str) -> dict[str, int]:
    """How many heads of a token are in the registers of a program at a time, and its warps."""
    half = next_power_of_2(rotary_dim // 2)
    rest = next_power_of_2(max(1, head_dim - rotary_dim))
    row_bytes = next_power_of_2(head_dim) * itemsize
    token_bytes = min(LARGEST_TOKEN, max(LARGEST_TOKEN // 4, next_power_of_2(heads) * row_bytes))
    chosen = _settings.look_up("apply_rotary_at", f"tokens of {token_bytes} bytes", target)
    block_heads = min(next_power_of_2(heads), max(1, chosen["bytes"] // row_bytes))
    most_warps = max(1, block_heads * half * itemsize // 512)  # 16 bytes of each half for a thread
    return {
        "BLOCK_HEADS": block_heads,
        "BLOCK_HALF": half,
        "BLOCK_REST": rest,
        "num_warps": min(chosen["num_warps"], most_warps),
        "num_stages": 1,
    }


def apply_rotary_at(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    *,
    out: tuple[torch.Tensor, ...] | None = None,
) -> torch.Tensor:
    refuse_float64("x", x)
    batch, heads, selected, head_dim = x.shape
    rotary_dim = cos.shape[2] if rotary_dim is None else rotary_dim
    target = empty_ordered_like(x) if out is None else out[0]
    if target.numel() == 0:
        return target
    launch(
        apply_rotary_at_kernel,
        (selected, batch),
        x,
        x_ptr=x,
        cos_ptr=cos,
        sin_ptr=sin,
        positions_ptr=positions,
        out_ptr=target,
        **strides("batch", "head", "entry", x=x, out=target),
        **strides("batch", positions=positions),
        **table_strides(cos=cos, sin=sin),
        HEADS=heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        INTERLEAVED=interleaved,
        enable_fp_fusion=True,
        **launch_settings(heads, head_dim, rotary_dim, x.element_size(), target_of(x.device)),
    )
    return target
