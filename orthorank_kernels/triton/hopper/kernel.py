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
behind its own last key it lets go unread, and with a window those before its own first one.

Rows of V behind the tile's last key may hold anything, and 0 times NaN is NaN. TMA would bring them, so the last block
of V is not copied by it: the first consumer loads that one and puts zeros there. K needs nothing: its scores are
replaced. What lies before the first key is not read.

Pages are copied one by one, each into its rows of a block: ``k_desc`` and ``v_desc`` then have boxes of min(PAGE_SIZE,
BLOCK_N) rows, and with a window of 16. The first block begins at a multiple of those. So with a window it may hold rows
before the first key, and the producer loads its first 16 rows of V by threads, which put zeros there.

A head_dim of 96 or 192 is computed as BLOCK_D = 128 or 256, with zeros behind it: TMA puts them where a box reaches
beyond the tensor's last dimension, and threads do the same.

Not here: float32, float8, pages of other sizes than powers of two from 16 on.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from orthorank_kernels.triton.hopper.consumer import consume
from orthorank_kernels.triton.hopper.gluon import find_sequence, find_work
from orthorank_kernels.triton.hopper.producer import produce
from orthorank_kernels.triton.hopper.step import CONSUMERS, ROWS, WARPS, rows_of_part, visible_keys


@gluon.jit(
    do_not_specialize=[
        "selected",
        "keys",
        "n_seqs",
        "query_offset",
        "window",
        "n_pages",
        "n_table_rows",
        "most_keys",
        "tiles",
        "columns",
        "lanes",
        "lanes_together",
        "splits",
        "stride_positions_batch",
        "stride_table_row",
        "stride_lse_split",
        "stride_lse_batch",
        "stride_lse_head",
        "stride_lse_token",
    ]
)
def hopper_attention_kernel(
    q_ptr,  # [batch, heads, selected, head_dim] by strides
    k_desc,  # [batch or pages, kv_heads, keys of one, head_dim] in boxes [1, 1, rows of a copy, BLOCK_D]
    v_desc,
    v_ptr,
    positions_ptr,  # [batch, selected]
    starts_ptr,  # [batch]
    cu_selected_ptr,  # with PACKED: [n_seqs + 1]
    cu_keys_ptr,  # with PACKED and without pages: [n_seqs + 1]
    seq_lens_ptr,  # with pages: [n_seqs]
    table_ptr,  # with pages: [rows, pages]
    table_rows_ptr,  # [n_seqs]
    sinks_ptr,  # [heads], logits
    out_ptr,  # [batch, heads, selected, head_dim] by strides; with SPLIT: float32 [splits, ...], not yet divided
    lse_ptr,  # [batch, heads, selected] by strides, float32; with SPLIT: the largest score so far, in bits
    totals_ptr,  # with SPLIT: like lse_ptr, the sum of weights so far
    cos_ptr,  # [batch or 1, tokens, at least ROTARY_DIM // 2]
    sin_ptr,
    selected,
    keys,
    n_pages,  # with pages: of the cache
    n_table_rows,
    most_keys,  # that a row of the table has pages for
    n_seqs,
    query_offset,
    window,
    tiles,
    columns,  # of heads: key/value heads times tiles of a group
    lanes,  # columns of heads times batch rows
    lanes_together,
    splits,
    to_bits,  # softmax scale * log2(e), with SOFTCAP: * 2 / softcap
    cap,  # softcap * log2(e)
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_v_batch,  # with pages: between pages
    stride_v_head,
    stride_table_row,
    stride_positions_batch,
    stride_out_split,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_lse_split,
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
    BLOCK_D: gl.constexpr,  # the power of two that HEAD_DIM is filled up to
    HEAD_DIM: gl.constexpr,
    STAGES: gl.constexpr,
    PACKED: gl.constexpr,
    PAGE_SIZE: gl.constexpr,  # a power of two; 0: keys are not in pages
    SOFTCAP: gl.constexpr,
    SPLIT: gl.constexpr,
    ROTARY_DIM: gl.constexpr,  # elements of a query's head to turn; 0: none
    INTERLEAVED: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """One program: one tile of queries and heads, grid (tiles * splits * lanes,)."""
    batch, column, tile, split = find_work(gl.program_id(0), tiles, columns, lanes, lanes_together, splits, SPLIT)
    kv_head = column // ((GROUP + PACK - 1) // PACK)
    query_begin = 0
    query_end = selected
    key_base = gl.to_tensor(0)
    start = 0
    if PACKED:
        QUERIES: gl.constexpr = CONSUMERS * (ROWS // PACK)
        sequence, query_begin, query_end, tile = find_sequence(cu_selected_ptr, n_seqs, selected, tile, QUERIES)
        owned = sequence < n_seqs  # else what lies past the last sequence, which sees no keys
        if PAGE_SIZE > 0:
            keys = gl.minimum(gl.load(seq_lens_ptr + sequence, mask=owned, other=0), most_keys)
            table_row = sequence
            if table_rows_ptr is not None:
                table_row = gl.load(table_rows_ptr + sequence, mask=owned, other=0)
                table_row = gl.minimum(gl.maximum(table_row, 0), n_table_rows - 1)
            table_ptr += table_row.to(gl.int64) * stride_table_row
        else:
            key_base = gl.load(cu_keys_ptr + sequence, mask=owned, other=0)
            keys = gl.load(cu_keys_ptr + sequence + 1, mask=owned, other=0) - key_base
    if starts_ptr is not None:
        start = gl.maximum(gl.load(starts_ptr + batch), 0)
    positions_ptr += batch.to(gl.int64) * stride_positions_batch
    row = gl.arange(0, CONSUMERS * ROWS, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    query, _head, in_tile = rows_of_part(row // ROWS, row % ROWS, tile, query_begin, query_end, column, GROUP, PACK)
    _position, sees, first, last = visible_keys(positions_ptr, query, in_tile, query_offset, keys, start, window)
    # No row sees anything: one block all the same, all of it masked, so that nothing below has to ask.
    high = gl.max(gl.where(sees, last, -1), 0)
    low = start
    if window is not None:
        low = gl.maximum(gl.min(gl.where(sees, first, high), 0), start)
    lowest = low
    if PAGE_SIZE > 0:  # a copy begins where a page does, or within it at a multiple of its rows
        low = low // k_desc.block_type.shape[2] * k_desc.block_type.shape[2]
    blocks = gl.maximum(high - low, 0) // BLOCK_N + 1
    to_the_end = True
    if SPLIT:  # whole blocks, so that the splits' ends are ends of blocks; to the rows there are no other keys
        begin = (blocks.to(gl.int64) * split // splits).to(gl.int32)
        end = (blocks.to(gl.int64) * (split + 1) // splits).to(gl.int32)
        to_the_end = end == blocks
        high = gl.minimum(high, low + end * BLOCK_N - 1)
        low += begin * BLOCK_N
        lowest = gl.maximum(lowest, low)
        start = gl.maximum(start, low)
        keys = gl.minimum(keys, high + 1)
        blocks = gl.maximum(end - begin, 1)

    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    Q_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_D], k_desc.dtype)
    q_bufs = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, ROWS, BLOCK_D], Q_LAYOUT)
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
    v_ptr += kv_head.to(gl.int64) * stride_v_head
    if PAGE_SIZE == 0:
        v_ptr += batch.to(gl.int64) * stride_v_batch + key_base.to(gl.int64) * STRIDE_V
    out_ptr += batch.to(gl.int64) * stride_out_batch
    if SPLIT:
        out_ptr += split.to(gl.int64) * stride_out_split
    if lse_ptr is not None:
        lse_rows = batch.to(gl.int64) * stride_lse_batch
        if SPLIT:
            lse_rows += split.to(gl.int64) * stride_lse_split
            totals_ptr += lse_rows
        lse_ptr += lse_rows
    if ROTARY_DIM > 0:
        cos_ptr += batch.to(gl.int64) * stride_cos_batch
        sin_ptr += batch.to(gl.int64) * stride_sin_batch
    tables = (cos_ptr, sin_ptr, stride_cos_token, stride_sin_token)
    values = (v_ptr, table_ptr, n_pages, stride_v_batch)
    tensors = (q_ptr, values, positions_ptr, sinks_ptr, out_ptr, lse_ptr, totals_ptr)
    strides = (stride_q_head, stride_q_token, stride_out_head, stride_out_token, stride_lse_head, stride_lse_token)
    numbers = (query_begin, query_end, keys, query_offset, window, (to_bits, cap), strides)
    where = (tile, column, start, low, lowest, high, blocks, to_the_end)
    EDGE: gl.constexpr = PAGE_SIZE > 0 and window is not None
    gl.warp_specialize(
        [
            (
                consume,
                (
                    q_bufs, rings, tensors, tables, numbers, where, 0, PAGE_SIZE, STRIDE_V, GROUP, PACK, BLOCK_N,
                    BLOCK_D, HEAD_DIM, STAGES, SOFTCAP, SPLIT, ROTARY_DIM, INTERLEAVED,
                ),
            ),
            (
                consume,
                (
                    q_bufs, rings, tensors, tables, numbers, where, 1, PAGE_SIZE, STRIDE_V, GROUP, PACK, BLOCK_N,
                    BLOCK_D, HEAD_DIM, STAGES, SOFTCAP, SPLIT, ROTARY_DIM, INTERLEAVED,
                ),
            ),
            (
                produce,
                (
                    k_desc, v_desc, rings, values, (batch, kv_head, key_base), (low, lowest, high, blocks), PAGE_SIZE,
                    EDGE, STRIDE_V, BLOCK_N, BLOCK_D, HEAD_DIM, STAGES,
                ),
            ),
        ],
        [WARPS, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
