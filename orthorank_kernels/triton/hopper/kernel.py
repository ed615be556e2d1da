"""Attention of selected queries for sm_90: one warp copies keys and values, two groups of four warps attend to them.

    out[i] = softmax(scale * q[i] k[start..p]^T) v[start..p],   p = positions[i] + query_offset

A tile has two parts of ROWS rows (queries times the heads of a group), one for each consumer. The keys from the tile's
first to its last are cut into blocks, which begin at the first, and are taken **from the last one backwards**, so that
blocks with a mask come first and the loop without one has no loop behind it. The producer copies them by TMA into a
ring of STAGES blocks for K and one for V. `k_full` and `v_full` say that a block is there, `k_empty` and `v_empty` that
both consumers are done with it; the i-th block is in place i % STAGES, and its phase of those barriers has the parity
of i // STAGES.

A consumer issues the scores of block i and, behind them, the sums of values of block i - 1, waits for the scores alone,
and computes the softmax of block i while the sums run: that is what the tensor cores do while it exponentiates. Blocks
behind its own last key it lets go unread.

Rows of V behind the tile's last key may hold anything, and 0 times NaN is NaN. TMA would bring them, so the last block
of V is not copied by it: the first consumer loads that one and puts zeros there. K needs nothing: its scores are
replaced. What lies before the first key is never read.

Not here: float32, windows, soft-capping, sinks, pages, keys split over programs.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from orthorank_kernels.triton.hopper.fill import fill_last_values, fill_queries
from orthorank_kernels.triton.hopper.gluon import async_load, find_sequence
from orthorank_kernels.triton.hopper.step import (
    CONSUMERS,
    ROWS,
    attend,
    last_keys,
    rows_of_part,
    scores,
    softmax_step,
)

WARPS = gl.constexpr(4)  # of a consumer
LN_2 = gl.constexpr(0.6931471805599453)
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
    STRIDE_V: gl.constexpr,
    GROUP: gl.constexpr,
    PACK: gl.constexpr,
    BLOCK_N: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    ROTARY_DIM: gl.constexpr,
):
    """One part of a tile, from its queries to its output."""
    k_bufs, v_bufs, k_full, k_empty, v_full, v_empty = rings
    q_ptr, v_ptr, positions_ptr, out_ptr, lse_ptr = tensors
    begin, end, keys, query_offset, to_bits, strides = numbers
    stride_q_head, stride_q_token, stride_out_head, stride_out_token, stride_lse_head, stride_lse_token = strides
    tile, column, start, high, blocks = where
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    # Sixteen bytes a thread, for what goes to and from global memory.
    WIDE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [WARPS, 1], [1, 0])
    offs_d = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, WIDE))
    dtype: gl.constexpr = k_bufs.dtype

    if PART == 0:  # before the queries: with both at hand, turned queries of head_dim 128 spill
        n = start + (blocks - 1) * BLOCK_N
        fill_last_values(v_bufs.index(0), v_ptr, n, high, offs_d, STRIDE_V, BLOCK_N, HEAD_DIM, WIDE)
        mbarrier.arrive(v_full.index(0), count=1)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    query, head, in_tile = rows_of_part(PART, row, tile, begin, end, column, GROUP, PACK)
    position, sees, _last = last_keys(positions_ptr, query, in_tile, query_offset, keys, start)
    rows = head.to(gl.int64) * stride_q_head + query.to(gl.int64) * stride_q_token
    q = q_bufs.index(PART)
    fill_queries(q, q_ptr, rows, in_tile, tables, position, sees, offs_d, HEAD_DIM, ROTARY_DIM)

    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, S_LAYOUT))
    query, head, in_tile = rows_of_part(PART, row, tile, begin, end, column, GROUP, PACK)
    _position, sees, last = last_keys(positions_ptr, query, in_tile, query_offset, keys, start)
    own_high = gl.max(gl.where(sees, last, start), 0)
    last = gl.where(sees, last, own_high)
    own_blocks = (own_high - start) // BLOCK_N + 1
    first = blocks - own_blocks
    masked_end = gl.maximum(blocks - (gl.min(last, 0) + 1 - start) // BLOCK_N, first + 1)

    for i in range(first):
        mbarrier.wait(k_full.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.arrive(k_empty.index(i % STAGES), count=1)
        mbarrier.wait(v_full.index(i % STAGES), (i // STAGES) & 1)
        mbarrier.arrive(v_empty.index(i % STAGES), count=1)

    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=O_LAYOUT)
    total = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT))
    peak = gl.zeros([ROWS], gl.float32, layout=gl.SliceLayout(1, S_LAYOUT)) + LOWEST_SCORE * to_bits
    n = start + (own_blocks - 1) * BLOCK_N
    mbarrier.wait(k_full.index(first % STAGES), (first // STAGES) & 1)
    qk = warpgroup_mma_wait(0, deps=[scores(q, k_bufs.index(first % STAGES), BLOCK_N, HEAD_DIM, S_LAYOUT)])
    mbarrier.arrive(k_empty.index(first % STAGES), count=1)
    weights, peak, _shrink, total = softmax_step(qk, peak, total, last, n, to_bits, BLOCK_N, S_LAYOUT, True)
    weights = gl.convert_layout(weights.to(dtype), P_LAYOUT)
    for i in range(first + 1, masked_end):
        n = start + (blocks - 1 - i) * BLOCK_N
        acc, weights, peak, total = attend(
            acc, weights, peak, total, i, q, rings, last, n, to_bits, BLOCK_N, HEAD_DIM, STAGES, S_LAYOUT, True
        )
    for i in range(masked_end, blocks):
        acc, weights, peak, total = attend(
            acc, weights, peak, total, i, q, rings, last, 0, to_bits, BLOCK_N, HEAD_DIM, STAGES, S_LAYOUT, False
        )
    at = (blocks - 1) % STAGES
    mbarrier.wait(v_full.index(at), ((blocks - 1) // STAGES) & 1)
    sums = warpgroup_mma(weights, v_bufs.index(at).reshape([BLOCK_N, HEAD_DIM]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[sums])

    total = gl.where(sees, total, 1.0)
    factor = gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))
    seen = gl.convert_layout(sees, gl.SliceLayout(1, O_LAYOUT))
    out = gl.convert_layout(gl.where(seen[:, None], acc * factor[:, None], 0.0).to(dtype), WIDE)
    if lse_ptr is not None:
        lse = gl.where(sees, (peak + gl.log2(total)) * LN_2, NOTHING)
        lse_rows = head.to(gl.int64) * stride_lse_head + query.to(gl.int64) * stride_lse_token
        gl.store(lse_ptr + lse_rows, lse, mask=in_tile)
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WIDE))
    query, head, in_tile = rows_of_part(PART, row, tile, begin, end, column, GROUP, PACK)
    out_rows = head.to(gl.int64) * stride_out_head + query.to(gl.int64) * stride_out_token
    gl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out, mask=in_tile[:, None])


@gluon.jit
def produce(k_desc, v_desc, rings, batch, kv_head, first_row, blocks, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Copy blocks of keys and values as their places in the rings become free."""
    k_bufs, v_bufs, k_full, k_empty, v_full, v_empty = rings
    for i in range(blocks):
        at = i % STAGES
        free = (i // STAGES & 1) ^ 1
        n = first_row + (blocks - 1 - i) * BLOCK_N
        mbarrier.wait(k_empty.index(at), free)
        mbarrier.expect(k_full.index(at), k_desc.block_type.nbytes)
        async_load(k_desc, [batch, kv_head, n, 0], k_full.index(at), k_bufs.index(at))
        if i > 0:  # block 0 of V is the first consumer's: see `fill_last_values`
            mbarrier.wait(v_empty.index(at), free)
            mbarrier.expect(v_full.index(at), v_desc.block_type.nbytes)
            async_load(v_desc, [batch, kv_head, n, 0], v_full.index(at), v_bufs.index(at))


@gluon.jit(
    do_not_specialize=[
        "selected",
        "keys",
        "n_seqs",
        "query_offset",
        "stride_positions_batch",
        "stride_lse_batch",
        "stride_lse_head",
        "stride_lse_token",
    ]
)
def hopper_attention_kernel(
    q_ptr,  # [batch, heads, selected, head_dim] by strides
    k_desc,  # [batch, kv_heads, keys, head_dim] in blocks [1, 1, BLOCK_N, HEAD_DIM]
    v_desc,
    v_ptr,
    positions_ptr,  # [batch, selected]
    starts_ptr,  # [batch]
    cu_selected_ptr,  # with PACKED: [n_seqs + 1]
    cu_keys_ptr,  # with PACKED: [n_seqs + 1]
    out_ptr,  # [batch, heads, selected, head_dim] by strides
    lse_ptr,  # [batch, heads, selected] by strides, float32
    cos_ptr,  # [batch or 1, tokens, at least ROTARY_DIM // 2]
    sin_ptr,
    selected,
    keys,
    n_seqs,
    query_offset,
    to_bits,  # softmax scale * log2(e)
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_v_batch,
    stride_v_head,
    stride_positions_batch,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_lse_batch,
    stride_lse_head,
    stride_lse_token,
    stride_cos_batch,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_token,
    STRIDE_V: gl.constexpr,  # between tokens
    GROUP: gl.constexpr,  # query heads that share a key/value head
    PACK: gl.constexpr,  # of these, how many share a tile
    BLOCK_N: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
    ROTARY_DIM: gl.constexpr,  # elements of a query's head to turn, in halves; 0: none
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """One program: one tile of queries and heads, grid (tiles, kv_heads * head tiles, batch)."""
    tile = gl.program_id(0)
    column = gl.program_id(1)
    kv_head = column // ((GROUP + PACK - 1) // PACK)
    batch = gl.program_id(2)
    query_begin = 0
    query_end = selected
    key_base = 0
    start = 0
    if PACKED:
        QUERIES: gl.constexpr = CONSUMERS * (ROWS // PACK)
        sequence, query_begin, query_end, tile = find_sequence(cu_selected_ptr, n_seqs, selected, tile, QUERIES)
        owned = sequence < n_seqs  # else what lies past the last sequence, which sees no keys
        key_base = gl.load(cu_keys_ptr + sequence, mask=owned, other=0)
        keys = gl.load(cu_keys_ptr + sequence + 1, mask=owned, other=0) - key_base
    if starts_ptr is not None:
        start = gl.maximum(gl.load(starts_ptr + batch), 0)
    positions_ptr += batch.to(gl.int64) * stride_positions_batch
    row = gl.arange(0, CONSUMERS * ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    query, _head, in_tile = rows_of_part(row // ROWS, row % ROWS, tile, query_begin, query_end, column, GROUP, PACK)
    _position, sees, last = last_keys(positions_ptr, query, in_tile, query_offset, keys, start)
    # Nobody sees anything: one block all the same, all of it masked, so that nothing below has to ask.
    high = gl.max(gl.where(sees, last, -1), 0)
    blocks = gl.maximum(high - start, 0) // BLOCK_N + 1

    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, HEAD_DIM], k_desc.dtype)
    q_bufs = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, ROWS, HEAD_DIM], Q_LAYOUT)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)

    rings = (k_bufs, v_bufs, k_full, k_empty, v_full, v_empty)
    q_ptr += batch.to(gl.int64) * stride_q_batch
    v_ptr += batch.to(gl.int64) * stride_v_batch + kv_head.to(gl.int64) * stride_v_head
    if PACKED:
        v_ptr += key_base.to(gl.int64) * STRIDE_V
    out_ptr += batch.to(gl.int64) * stride_out_batch
    if lse_ptr is not None:
        lse_ptr += batch.to(gl.int64) * stride_lse_batch
    if ROTARY_DIM > 0:
        cos_ptr += batch.to(gl.int64) * stride_cos_batch
        sin_ptr += batch.to(gl.int64) * stride_sin_batch
    tables = (cos_ptr, sin_ptr, stride_cos_token, stride_sin_token)
    tensors = (q_ptr, v_ptr, positions_ptr, out_ptr, lse_ptr)
    strides = (stride_q_head, stride_q_token, stride_out_head, stride_out_token, stride_lse_head, stride_lse_token)
    numbers = (query_begin, query_end, keys, query_offset, to_bits, strides)
    where = (tile, column, start, high, blocks)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    q_bufs, rings, tensors, tables, numbers, where, 0, STRIDE_V, GROUP, PACK, BLOCK_N, HEAD_DIM, STAGES,
                    ROTARY_DIM,
                ),
            ),
            (
                consume,
                (
                    q_bufs, rings, tensors, tables, numbers, where, 1, STRIDE_V, GROUP, PACK, BLOCK_N, HEAD_DIM, STAGES,
                    ROTARY_DIM,
                ),
            ),
            (produce, (k_desc, v_desc, rings, batch, kv_head, key_base + start, blocks, BLOCK_N, STAGES)),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
