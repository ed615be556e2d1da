"""Attention of selected queries: flash attention in which every query brings its own position.

    out[i] = softmax(scale * q[i] k[first..p]^T) v[first..p],   p = positions[i] + query_offset

An M tile holds BLOCK_M // PACK queries times PACK query heads of one key/value head, so K and V are read once for the
heads that share them. Positions ascend, so a tile's lowest and highest position, ``low`` and ``high``, split its keys
into blocks that every query sees whole (no mask at all), and the blocks between, which are masked. The tile with the
longest key range runs first.

Not here: packed sequences, paged caches, soft-capping, a backward pass, float64.
"""

import math

import torch
import triton
import triton.language as tl

from orthorank_kernels.triton import configs

# A masked score. Finite, because with a window a query may see nothing of a block, and -inf minus -inf is NaN. A power
# of two, because times the scale it must round to itself, or a fused multiply-add would leave a remainder.
MASKED_SCORE = tl.constexpr(-(2.0**100))
INT32_MAX = 2**31 - 1
LARGEST_HEAD_DIM = 256


@triton.jit
def _tile_rows(row, selected, GROUP: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query and head of each row of this program's tile, and whether there is one: [BLOCK_M] each."""
    QUERIES: tl.constexpr = BLOCK_M // PACK
    HEAD_TILES: tl.constexpr = (GROUP + PACK - 1) // PACK
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the last tile has the most keys, so it runs first
    query = tile * QUERIES + row // PACK
    group_head = (tl.program_id(1) % HEAD_TILES) * PACK + row % PACK
    head = (tl.program_id(1) // HEAD_TILES) * GROUP + group_head
    return query, head, (row < QUERIES * PACK) & (query < selected) & (group_head < GROUP)


@triton.jit
def _load_rows(ptr, rows, offs_d, STRIDE: tl.constexpr, HEAD_DIM: tl.constexpr, WIDE: tl.constexpr):
    """Rows of K or V: [BLOCK_N, BLOCK_D], zeros past HEAD_DIM."""
    if WIDE:
        rows = rows.to(tl.int64)
    ptrs = ptr + rows[:, None] * STRIDE + offs_d[None, :]
    if HEAD_DIM == offs_d.shape[0]:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=offs_d[None, :] < HEAD_DIM, other=0.0)


@triton.jit
def _attend(
    acc,  # [BLOCK_M, BLOCK_D] weighted sum of values so far
    total,  # [BLOCK_M] sum of weights so far
    peak,  # [BLOCK_M] largest score so far, times qk_scale
    q,  # [BLOCK_M, BLOCK_D]
    k_ptr,
    v_ptr,
    k_desc,
    v_desc,
    batch,
    kv_head,
    n,  # first key of the block
    first,  # [BLOCK_M] first key that each query sees
    last,  # [BLOCK_M] last key that each query sees
    high,  # last key that some query of the tile sees
    qk_scale,
    STRIDE_K: tl.constexpr,
    STRIDE_V: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,
):
    """One step of the online softmax: the keys n .. n + BLOCK_N."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    key = n + offs_n
    # Rows past `high` are clamped, not masked off: they are never read, and the loads keep their full width.
    rows = tl.minimum(key, high) if MASKED else key
    if TMA and not MASKED:
        k = k_desc.load([batch, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        k = _load_rows(k_ptr, rows, offs_d, STRIDE_K, HEAD_DIM, WIDE)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    if MASKED:
        if TMA:
            seen = key[None, :] <= last[:, None]
        else:  # the same; keeps the columns in registers, which saves instructions and with TMA costs 40 registers
            seen = offs_n[None, :] <= (last - n)[:, None]
        if HAS_WINDOW:
            seen = seen & (key[None, :] >= first[:, None])
        qk = tl.where(seen, qk, MASKED_SCORE)
    new_peak = tl.maximum(peak, tl.max(qk, 1) * qk_scale)
    weights = tl.math.exp2(qk * qk_scale - new_peak[:, None])
    shrink = tl.math.exp2(peak - new_peak)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    if TMA and not MASKED:
        v = v_desc.load([batch, kv_head, n, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        v = _load_rows(v_ptr, rows, offs_d, STRIDE_V, HEAD_DIM, WIDE)
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, new_peak


@triton.jit(do_not_specialize=["selected", "keys", "window", "query_offset", "stride_positions_batch"])
def sparse_query_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # with TMA: descriptors of k and v, [batch, kv_heads, keys, head_dim] in blocks [1, 1, BLOCK_N, BLOCK_D]
    v_desc,
    positions_ptr,
    starts_ptr,
    out_ptr,  # [batch, selected, heads, head_dim], contiguous
    selected,
    keys,
    window,
    query_offset,
    qk_scale,  # softmax scale * log2(e)
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_k_batch,
    stride_k_head,
    stride_v_batch,
    stride_v_head,
    stride_positions_batch,
    STRIDE_K: tl.constexpr,  # between tokens: belongs to the model's layout, not to the prompt
    STRIDE_V: tl.constexpr,
    STRIDE_POSITIONS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,  # query heads that share a key/value head
    PACK: tl.constexpr,  # of these, how many share a tile
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    TMA: tl.constexpr,
    WIDE: tl.constexpr,  # keys * stride exceeds 32 bits
):
    """One program: one tile of queries and heads, grid (tiles, kv_heads * head tiles, batch)."""
    kv_head = tl.program_id(1) // ((GROUP + PACK - 1) // PACK)
    batch = tl.program_id(2)
    qk_scale = tl.cast(qk_scale, tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    query, head, in_tile = _tile_rows(tl.arange(0, BLOCK_M), selected, GROUP, PACK, BLOCK_M)

    positions_ptr += batch.to(tl.int64) * stride_positions_batch
    position = tl.load(positions_ptr + query.to(tl.int64) * STRIDE_POSITIONS, mask=in_tile, other=-1)
    start = 0
    if HAS_STARTS:
        start = tl.maximum(tl.load(starts_ptr + batch), 0)
    at = position + query_offset
    last = tl.minimum(at, keys - 1)
    first = tl.zeros([BLOCK_M], tl.int32) + start
    if HAS_WINDOW:
        first = tl.maximum(first, at - window + 1)
    sees = (position >= 0) & (first <= last)
    high = tl.max(tl.where(sees, last, -1))  # -1: no query of this tile sees anything, no loop runs
    # A blind row stands at `high` and computes something finite that is never stored.
    last = tl.where(sees, last, high)
    low = tl.min(last)
    begin = start
    middle = start
    if HAS_WINDOW:
        highest_first = tl.max(tl.where(sees, first, 0))
        begin = tl.min(tl.where(sees, first, highest_first))
        first = tl.where(sees, first, begin)
        middle = begin + tl.cdiv(tl.maximum(highest_first - begin, 0), BLOCK_N) * BLOCK_N
    unmasked_end = middle + tl.maximum(low + 1 - middle, 0) // BLOCK_N * BLOCK_N

    q_ptrs = q_ptr + batch.to(tl.int64) * stride_q_batch
    q_ptrs += (head.to(tl.int64) * stride_q_head + query.to(tl.int64) * stride_q_token)[:, None] + offs_d[None, :]
    q = tl.load(q_ptrs, mask=in_tile[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    # 64 bits for the base, 32 inside: wide offsets kept across the key loop cost 40 registers.
    k_ptr += batch.to(tl.int64) * stride_k_batch + kv_head.to(tl.int64) * stride_k_head
    v_ptr += batch.to(tl.int64) * stride_v_batch + kv_head.to(tl.int64) * stride_v_head

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if HAS_WINDOW:
        for n in range(begin, tl.minimum(middle, high + 1), BLOCK_N):
            acc, total, peak = _attend(
                acc, total, peak, q, k_ptr, v_ptr, k_desc, v_desc, batch, kv_head, n, first, last, high, qk_scale,
                STRIDE_K, STRIDE_V, HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_WINDOW, TMA, WIDE,
            )  # fmt: skip
    for n in range(middle, unmasked_end, BLOCK_N):
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, k_desc, v_desc, batch, kv_head, n, first, last, high, qk_scale,
            STRIDE_K, STRIDE_V, HEAD_DIM, BLOCK_D, BLOCK_N, False, HAS_WINDOW, TMA, WIDE,
        )  # fmt: skip
    for n in range(unmasked_end, high + 1, BLOCK_N):
        acc, total, peak = _attend(
            acc, total, peak, q, k_ptr, v_ptr, k_desc, v_desc, batch, kv_head, n, first, last, high, qk_scale,
            STRIDE_K, STRIDE_V, HEAD_DIM, BLOCK_D, BLOCK_N, True, HAS_WINDOW, TMA, WIDE,
        )  # fmt: skip

    out = tl.where(sees[:, None], acc * (1.0 / tl.where(sees, total, 1.0))[:, None], 0.0)
    # The rows again, from an index that the compiler cannot know to be the same: else it keeps them in registers across
    # the key loops, which costs 40 of them and, on sm_80 with head_dim 128, spills.
    row = tl.arange(0, BLOCK_M) + tl.minimum(selected, 0)
    query, head, in_tile = _tile_rows(row, selected, GROUP, PACK, BLOCK_M)
    out_row = (batch.to(tl.int64) * selected + query) * (KV_HEADS * GROUP) + head
    out_ptrs = out_ptr + out_row[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & (offs_d < HEAD_DIM)[None, :])


def sparse_query_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    scale: float,
    window: int | None,
    starts: torch.Tensor | None,
    query_offset: int,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
    *,
    out: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Launch the kernel; see `orthorank_kernels.sparse_query_attention`. Arguments are taken as checked."""
    batch, heads, selected, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    _check_supported(head_dim, q.dtype)
    if softcap is not None or sinks is not None or return_lse:
        raise NotImplementedError('softcap, sinks and return_lse run on the reference: pass backend="reference"')
    if out is None:
        out = q.new_empty(batch, selected, heads, head_dim).transpose(1, 2), q.new_empty(0, dtype=torch.float32)
    result, lse = out
    if result.numel() == 0:
        return result, lse
    target = configs.target_of(q.device)
    constexprs, num_warps, num_stages = configs.launch_settings(head_dim, heads // kv_heads, q.dtype, target)
    use_tma = constexprs.pop("TMA") and configs.fits_tma(k) and configs.fits_tma(v)
    block = [1, 1, constexprs["BLOCK_N"], constexprs["BLOCK_D"]]
    tiles = triton.cdiv(selected, constexprs["BLOCK_M"] // constexprs["PACK"])
    head_tiles = triton.cdiv(constexprs["GROUP"], constexprs["PACK"])
    with torch.cuda.device_of(q):
        sparse_query_attention_kernel[(tiles, kv_heads * head_tiles, batch)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            k_desc=_descriptor(k, block) if use_tma else None,
            v_desc=_descriptor(v, block) if use_tma else None,
            positions_ptr=positions,
            starts_ptr=starts,
            out_ptr=result,
            selected=selected,
            keys=keys,
            window=None if window is None else min(window, INT32_MAX),
            query_offset=query_offset,
            qk_scale=scale * math.log2(math.e),
            stride_q_batch=q.stride(0),
            stride_q_head=q.stride(1),
            stride_q_token=q.stride(2),
            stride_k_batch=k.stride(0),
            stride_k_head=k.stride(1),
            stride_v_batch=v.stride(0),
            stride_v_head=v.stride(1),
            stride_positions_batch=positions.stride(0),
            STRIDE_K=_token_stride(k),
            STRIDE_V=_token_stride(v),
            STRIDE_POSITIONS=positions.stride(1) if selected > 1 else 1,
            KV_HEADS=kv_heads,
            HAS_STARTS=starts is not None,
            HAS_WINDOW=window is not None,
            TMA=use_tma,
            WIDE=keys * max(_token_stride(k), _token_stride(v)) > INT32_MAX,
            num_warps=num_warps,
            num_stages=num_stages,
            enable_fp_fusion=True,
            **constexprs,
        )
    return result, lse


def _check_supported(head_dim: int, dtype: torch.dtype) -> None:
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"q has head_dim {head_dim}; the Triton kernel takes at most {LARGEST_HEAD_DIM}: "
            'pass backend="reference" for larger ones'
        )
    if dtype == torch.float64:
        raise TypeError(
            "q has dtype float64; the Triton kernel takes float32, float16 and bfloat16: "
            'convert q, k and v, or pass backend="reference"'
        )


def _token_stride(x: torch.Tensor) -> int:
    """Stride between tokens. With one token any number can stand there; one choice saves compiling for each."""
    return x.stride(2) if x.shape[2] > 1 else x.shape[3]


def _descriptor(x: torch.Tensor, block: list[int]) -> object:
    from triton.tools.tensor_descriptor import TensorDescriptor  # missing before Triton 3.4

    return TensorDescriptor(x, list(x.shape), list(x.stride()), block)
