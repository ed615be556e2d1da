"""What one of the two groups of warps does that attend: a part of a tile, from its queries to its output."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from orthorank_kernels.triton.hopper.fill import WIDE, fill_last_values, fill_queries
from orthorank_kernels.triton.hopper.step import ROWS, WARPS, attend, rows_of_part, scores, softmax_step, visible_keys

LN_2 = gl.constexpr(0.6931471805599453)
LOG2_E = gl.constexpr(1.4426950408889634)
NOTHING = gl.constexpr(float("-inf"))
# Where the largest score starts: above a masked one, so that what a row does not see weighs 0 from the first block on.
LOWEST_SCORE = gl.constexpr(-(2.0**99))


@gluon.jit
def consume(
    q_bufs,
    rings,
    tensors,
    tables,
    numbers,
    where,
    PART: gl.constexpr,
    PAGE_SIZE: gl.constexpr,
    STRIDE_V: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    SOFTCAP: gl.constexpr,
    SPLIT: gl.constexpr,
    ROTARY_DIM: gl.constexpr,
    INTERLEAVED: gl.constexpr,
):
    """One part of a tile, from its queries to its output."""
    k_bufs, v_bufs, k_full, k_empty, v_full, v_empty = rings
    q_ptr, values, positions_ptr, sinks_ptr, out_ptr, lse_ptr, totals_ptr = tensors
    begin, end, keys, query_offset, window, factors, strides = numbers
    stride_q_head, stride_q_token, stride_out_head, stride_out_token, stride_lse_head, stride_lse_token = strides
    tile, column, start, low, lowest, high, blocks, to_the_end = where
    HAS_WINDOW: gl.constexpr = window is not None
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = k_bufs.dtype

    if PART == 0:  # before the queries: with both at hand, turned queries of head_dim 128 spill
        n = low + (blocks - 1) * BLOCK_N
        fill_last_values(v_bufs.index(0), values, n, lowest, high, PAGE_SIZE, STRIDE_V, BLOCK_N, BLOCK_D, HEAD_DIM)
        mbarrier.arrive(v_full.index(0), count=1)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    query, head, in_tile = rows_of_part(PART, row, tile, begin, end, column, GROUP, PACK)
    position, sees, _first, _last = visible_keys(positions_ptr, query, in_tile, query_offset, keys, start, window)
    rows = head.to(gl.int64) * stride_q_head + query.to(gl.int64) * stride_q_token
    q = q_bufs.index(PART)
    fill_queries(q, q_ptr, rows, in_tile, tables, position, sees, BLOCK_D, HEAD_DIM, ROTARY_DIM, INTERLEAVED)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    query, head, in_tile = rows_of_part(PART, row, tile, begin, end, column, GROUP, PACK)
    position, sees, first, last = visible_keys(positions_ptr, query, in_tile, query_offset, keys, start, window)
    own_high = gl.max(gl.where(sees, last, low), 0)
    last = gl.where(sees, last, own_high)
    own_blocks = (own_high - low) // BLOCK_N + 1
    i0 = blocks - own_blocks  # this part's first block
    masked_end = gl.maximum(blocks - (gl.min(last, 0) + 1 - low) // BLOCK_N, i0 + 1)
    end_blocks = blocks
    if HAS_WINDOW:  # rows that see nothing stand at the last key
        first = gl.where(sees, first, own_high)
        end_blocks = blocks - (gl.min(first, 0) - low) // BLOCK_N
        whole = (gl.max(gl.where(sees, first, low), 0) - low + BLOCK_N - 1) // BLOCK_N
        masked_end = gl.minimum(masked_end, end_blocks)
        unmasked_end = gl.maximum(blocks - whole, masked_end)
    for i in range(i0):
        release(rings, i, STAGES)

    acc = gl.zeros([ROWS, BLOCK_D], gl.float32, layout=O_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    peak = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    peak += LOWEST_SCORE if SOFTCAP else LOWEST_SCORE * factors[0]
    if sinks_ptr is not None:  # a key of which only the weight counts, so it is where the softmax starts
        sink = gl.load(sinks_ptr + head, mask=in_tile, other=0.0).to(gl.float32) * LOG2_E
        if SPLIT:  # with the row's last key
            sink = gl.where(sees & (to_the_end | (position + query_offset <= high)), sink, NOTHING)
        peak = gl.maximum(peak, sink)
        total = gl.exp2(sink - peak)
    n = low + (own_blocks - 1) * BLOCK_N
    mbarrier.wait(k_full.index(i0 % STAGES), (i0 // STAGES) & 1)
    qk = warpgroup_mma_wait(0, deps=[scores(q, k_bufs.index(i0 % STAGES), BLOCK_N, BLOCK_D, S_LAYOUT)])
    mbarrier.arrive(k_empty.index(i0 % STAGES), count=1)
    weights, peak, _shrink, total = softmax_step(
        qk, peak, total, first, last, n, factors, BLOCK_N, S_LAYOUT, True, HAS_WINDOW, SOFTCAP
    )
    weights = gl.convert_layout(weights.to(dtype), P_LAYOUT)
    for i in range(i0 + 1, masked_end):
        n = low + (blocks - 1 - i) * BLOCK_N
        acc, weights, peak, total = attend(
            acc, weights, peak, total, i, q, rings, first, last, n, factors, BLOCK_N, BLOCK_D, STAGES, S_LAYOUT, True,
            HAS_WINDOW, SOFTCAP,
        )  # fmt: skip
    for i in range(masked_end, unmasked_end if HAS_WINDOW else blocks):
        acc, weights, peak, total = attend(
            acc, weights, peak, total, i, q, rings, first, last, 0, factors, BLOCK_N, BLOCK_D, STAGES, S_LAYOUT, False,
            HAS_WINDOW, SOFTCAP,
        )  # fmt: skip
    if HAS_WINDOW:
        for i in range(unmasked_end, end_blocks):
            n = low + (blocks - 1 - i) * BLOCK_N
            acc, weights, peak, total = attend(
                acc, weights, peak, total, i, q, rings, first, last, n, factors, BLOCK_N, BLOCK_D, STAGES, S_LAYOUT,
                True, HAS_WINDOW, SOFTCAP,
            )  # fmt: skip
    at = (end_blocks - 1) % STAGES
    mbarrier.wait(v_full.index(at), ((end_blocks - 1) // STAGES) & 1)
    sums = warpgroup_mma(weights, v_bufs.index(at).reshape([BLOCK_N, BLOCK_D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[sums])
    if HAS_WINDOW:
        mbarrier.arrive(v_empty.index(at), count=1)
        for i in range(end_blocks, blocks):
            release(rings, i, STAGES)

    if SPLIT:  # to be divided when all are there
        lse_rows = head.to(gl.int64) * stride_lse_head + query.to(gl.int64) * stride_lse_token
        gl.store(lse_ptr + lse_rows, gl.where(sees, peak, NOTHING), mask=in_tile)
        gl.store(totals_ptr + lse_rows, gl.where(sees, total, 0.0), mask=in_tile)
        seen = gl.convert_layout(sees, gl.SliceLayout(1, O_LAYOUT))
        out = gl.where(seen[:, None], acc, 0.0)
    else:
        total = gl.where(sees, total, 1.0)
        factor = gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))
        seen = gl.convert_layout(sees, gl.SliceLayout(1, O_LAYOUT))
        out = gl.convert_layout(gl.where(seen[:, None], acc * factor[:, None], 0.0).to(dtype), WIDE)
        if lse_ptr is not None:
            lse = gl.where(sees, (peak + gl.log2(total)) * LN_2, NOTHING)
            lse_rows = head.to(gl.int64) * stride_lse_head + query.to(gl.int64) * stride_lse_token
            gl.store(lse_ptr + lse_rows, lse, mask=in_tile)
    OUT: gl.constexpr = O_LAYOUT if SPLIT else WIDE
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, OUT))
    query, head, in_tile = rows_of_part(PART, row, tile, begin, end, column, GROUP, PACK)
    out_rows = head.to(gl.int64) * stride_out_head + query.to(gl.int64) * stride_out_token
    offs_d = gl.arange(0, BLOCK_D, layout=gl.SliceLayout(0, OUT))
    mask = in_tile[:, None] & (offs_d < HEAD_DIM)[None, :]
    gl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out, mask=mask)


@gluon.jit
def release(rings, i, STAGES: gl.constexpr):
    """Let a block go unread."""
    _k_bufs, _v_bufs, k_full, k_empty, v_full, v_empty = rings
    mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
    mbarrier.arrive(k_empty.index(i % STAGES), count=1)
    mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
    mbarrier.arrive(v_empty.index(i % STAGES), count=1)
