"""Keys rotated and written to a paged cache, with their values, in one launch.

    k_cache[slots[t] // PAGE_SIZE, slots[t] % PAGE_SIZE] = keys[t], rotated as by `apply_rotary_at`
    v_cache[slots[t] // PAGE_SIZE, slots[t] % PAGE_SIZE] = values[t]

keys, values [tokens, HEADS, HEAD_DIM], rows of one projection or not; k_cache, v_cache [blocks, PAGE_SIZE, HEADS,
HEAD_DIM], any strides; slots [tokens], int32 or int64; cos, sin [tokens or positions, width], of which the first half
of ROTARY_DIM is read; positions [tokens], int32 or int64, or None. A token whose slot is not one of the cache's, or
whose position is -1, reads nothing and writes nothing. Values of caches in 8 bits are scaled: not supported, nor is
float64.

DESIGN. Bytes: keys, values and their places in the cache once, a token's slot and position, and its angles (half a row
of cos and of sin). Apart, as `apply_rotary_at` and a write, the rotated keys are written and read once more: 6 passes
over keys or values instead of 4, and two launches. One program takes all heads of one token, by the functions and the
settings of `apply_rotary_at`, so the bits are its. Values are loaded before the keys are stored: all are in flight. The
half-split angles are loaded for each head, of which all but the first come from the L1 cache: requested / minimal 1.21
for 8 heads of 128, unique 1.000. Loaded once for few heads they are spread over the threads through shared memory, at
the cost of a barrier and of 2 bytes a load.

Compiled in bfloat16 for sm_80 / sm_90 / sm_100 / gfx942, without spills or atomics:

    8 heads of 128                     44 / 38 / 36 / 34 registers, 86 % of load bytes 128 bits wide
    32 heads of 128                    72 / 72 / 72 / 58
    8 heads of 128, half, interleaved  64 / 64 / 64 / 34, 86 %, 128 bytes of shared memory

Of few small heads (3 of 64) a thread has 8 bytes of each half, 25 %: a token is less than a warp can hold.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.triton.configs import launch, next_power_of_2, target_of
from orthorank_kernels.triton.primitives import refuse_float64
from orthorank_kernels.triton.rotary import launch_settings, rotate_heads
from orthorank_kernels.triton.strides import strides


@triton.jit(do_not_specialize=["n_slots"])
def apply_rotary_and_cache_kernel(
    k_cache_ptr,  # [blocks, PAGE_SIZE, HEADS, HEAD_DIM]
    stride_k_cache_block,
    stride_k_cache_token,
    stride_k_cache_head,
    v_cache_ptr,  # [blocks, PAGE_SIZE, HEADS, HEAD_DIM]
    stride_v_cache_block,
    stride_v_cache_token,
    stride_v_cache_head,
    slots_ptr,  # [tokens]
    keys_ptr,  # [tokens, HEADS, HEAD_DIM]
    stride_keys_token,
    stride_keys_head,
    values_ptr,  # [tokens, HEADS, HEAD_DIM]
    stride_values_token,
    stride_values_head,
    cos_ptr,  # [tokens or positions, ROTARY_DIM]
    stride_cos_token,
    sin_ptr,  # [tokens or positions, ROTARY_DIM]
    stride_sin_token,
    positions_ptr,  # [tokens], or None: the tables hold these tokens, in order
    n_slots,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    position = token
    if positions_ptr is not None:
        position = tl.load(positions_ptr + token).to(tl.int64)
    # Bounds of what is read and written: a token that is not cached has no heads.
    is_cached = (slot >= 0) & (slot < n_slots) & (position >= 0)
    n_heads = tl.where(is_cached, HEADS, 0)
    half_read = tl.where(is_cached, ROTARY_DIM // 2, 0)

    block = slot // PAGE_SIZE
    place = slot % PAGE_SIZE
    keys_ptr += token * stride_keys_token
    values_ptr += token * stride_values_token
    k_cache_ptr += block * stride_k_cache_block + place * stride_k_cache_token
    v_cache_ptr += block * stride_v_cache_block + place * stride_v_cache_token

    angles = tl.arange(0, BLOCK_HALF)[None, :]  # [1, BLOCK_HALF]
    if not INTERLEAVED:  # for each head, so that every thread loads its own: one load would be spread by a barrier
        angles += tl.zeros([BLOCK_HEADS, 1], tl.int32)  # [BLOCK_HEADS, BLOCK_HALF]
    cos = tl.load(cos_ptr + position * stride_cos_token + angles, mask=angles < half_read, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * stride_sin_token + angles, mask=angles < half_read, other=0.0).to(tl.float32)

    channels = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    for first_head in range(0, HEADS, BLOCK_HEADS):
        heads = first_head + tl.arange(0, BLOCK_HEADS)[:, None]  # [BLOCK_HEADS, 1]
        far_heads = heads.to(tl.int64)
        mask = (heads < n_heads) & (channels < HEAD_DIM)  # [BLOCK_HEADS, BLOCK_D]
        values = tl.load(values_ptr + far_heads * stride_values_head + channels, mask=mask)  # [BLOCK_HEADS, BLOCK_D]
        keys = keys_ptr + far_heads * stride_keys_head
        to = k_cache_ptr + far_heads * stride_k_cache_head
        rotate_heads(
            keys, to, cos, sin, heads, n_heads, n_heads, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_HALF, BLOCK_REST
        )
        tl.store(v_cache_ptr + far_heads * stride_v_cache_head + channels, values, mask=mask)


def apply_rotary_and_cache_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> None:
    refuse_float64("keys", keys)
    blocks, page_size, heads, head_dim = k_cache.shape
    rotary_dim = cos.shape[1] if rotary_dim is None else rotary_dim
    if keys.numel() == 0 or k_cache.numel() == 0:
        return
    settings = launch_settings(heads, head_dim, rotary_dim, keys.element_size(), target_of(keys.device))
    launch(
        apply_rotary_and_cache_kernel,
        (keys.shape[0],),
        keys,
        k_cache_ptr=k_cache,
        v_cache_ptr=v_cache,
        slots_ptr=slots,
        keys_ptr=keys,
        values_ptr=values,
        cos_ptr=cos,
        sin_ptr=sin,
        positions_ptr=positions,
        **strides("block", "token", "head", k_cache=k_cache, v_cache=v_cache),
        **strides("token", "head", keys=keys, values=values),
        **strides("token", cos=cos, sin=sin),
        n_slots=blocks * page_size,
        HEADS=heads,
        HEAD_DIM=head_dim,
        ROTARY_DIM=rotary_dim,
        PAGE_SIZE=page_size,
        INTERLEAVED=interleaved,
        BLOCK_D=next_power_of_2(head_dim),
        enable_fp_fusion=True,
        **settings,
    )
