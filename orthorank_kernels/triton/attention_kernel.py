"""The attention kernel: one source for keys in a batch, packed, and in pages; `triton/attention.py` says why so."""

import triton
import triton.language as tl

from orthorank_kernels.triton.attention_queries import scale_queries, starting_point, turn_queries
from orthorank_kernels.triton.attention_step import attend
from orthorank_kernels.triton.attention_tiles import find_sequence, find_work, tile_rows, visible_keys

LN_2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(float("-inf"))


@triton.jit(
    do_not_specialize=[
        "selected",
        "keys",
        "n_seqs",
        "tiles",
        "columns",
        "lanes",
        "lanes_together",
        "seqs_together",
        "splits",
        "window",
        "query_offset",
        "stride_positions_batch",
        "stride_lse_split",
        "stride_table_row",
        "n_pages",
        "n_table_rows",
        "most_keys",
        "stride_lse_batch",
        "stride_lse_head",
        "stride_lse_token",
    ]
)
def sparse_query_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    k_desc,  # with TMA: descriptors of k and v, [batch, kv_heads, keys, head_dim] in blocks [1, 1, BLOCK_N, BLOCK_D]
    v_desc,
    positions_ptr,
    starts_ptr,  # what is optional is None where it is not there
    cu_selected_ptr,  # with PACKED: [n_seqs + 1]
    cu_keys_ptr,  # with PACKED and without pages: [n_seqs + 1]
    seq_lens_ptr,  # with pages: [n_seqs]
    table_ptr,  # with pages: [rows, pages]
    table_rows_ptr,  # [n_seqs]
    cos_ptr,  # [batch or 1, tokens, at least ROTARY_DIM // 2]
    sin_ptr,
    sinks_ptr,
    k_scale_ptr,
    v_scale_ptr,
    out_ptr,  # [batch, selected, heads, head_dim] by strides; with SPLIT: float32 [splits, ...], not yet divided
    lse_ptr,  # [batch, heads, selected] by strides, float32; with SPLIT: the largest score so far, in bits
    totals_ptr,  # with SPLIT: like lse_ptr, the sum of weights so far
    selected,
    keys,
    n_pages,  # with pages: of the cache
    n_table_rows,
    most_keys,  # that a row of the table has pages for
    n_seqs,
    tiles,  # of a batch row, or of all packed sequences
    columns,  # kv_heads * head tiles
    lanes,  # columns * batch
    lanes_together,
    seqs_together,
    splits,
    window,
    query_offset,
    to_bits,  # softmax scale * log2(e), with SOFTCAP: * 2 / softcap
    cap,  # softcap * log2(e)
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_k_batch,  # with pages: between pages
    stride_k_head,
    stride_v_batch,
    stride_v_head,
    stride_positions_batch,
    stride_cos_batch,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_token,
    stride_table_row,
    stride_k_scale,
    stride_v_scale,
    stride_out_split,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_lse_split,
    stride_lse_batch,
    stride_lse_head,
    stride_lse_token,
    STRIDE_K: tl.constexpr,  # between tokens: belongs to the model's layout, not to the prompt
    STRIDE_V: tl.constexpr,
    PACKED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0: keys are not in pages
    LIKE_K: tl.constexpr,  # pages of v are as far apart as those of k, so that rows have one offset in both
    GROUP: tl.constexpr,  # query heads that share a key/value head
    PACK: tl.constexpr,  # of these, how many share a tile
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROTARY_DIM: tl.constexpr,  # elements of a query's head to rotate; 0: none
    INTERLEAVED: tl.constexpr,
    FP8: tl.constexpr,  # "", "e4m3" or "e5m2": keys and values are bytes
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    VENDOR: tl.constexpr,  # of the GPU: "nvidia", "amd", or "" in the interpreter
    WIDE: tl.constexpr,  # keys * stride exceeds 32 bits
    VECTOR: tl.constexpr,  # above 1: so many neighbours in a row of K or V are aligned to 16 bytes
):
    """One program: one tile of queries and heads, grid (tiles * splits * columns * batch)."""
    if LIKE_K:
        stride_v_batch = stride_k_batch
    batch, column, tile, split = find_work(tl.program_id(0), tiles, columns, lanes, lanes_together, splits, SPLIT)
    kv_head = column // ((GROUP + PACK - 1) // PACK)
    to_bits = tl.cast(to_bits, tl.float32)
    cap = tl.cast(cap, tl.float32)
    offs_d = tl.arange(0, BLOCK_D)
    query_begin = 0
    query_end = selected
    start = 0
    key_base = 0
    if PACKED:
        sequence, query_begin, query_end, tile = find_sequence(
            cu_selected_ptr, n_seqs, selected, tile, seqs_together, BLOCK_M // PACK
        )
        owned = sequence < n_seqs  # else what lies past the last sequence, which sees no keys
        if PAGE_SIZE > 0:
            keys = tl.minimum(tl.load(seq_lens_ptr + sequence, mask=owned, other=0), most_keys)
            table_row = sequence
            if table_rows_ptr is not None:
                table_row = tl.load(table_rows_ptr + sequence, mask=owned, other=0)
                table_row = tl.minimum(tl.maximum(table_row, 0), n_table_rows - 1)
            table_ptr += table_row.to(tl.int64) * stride_table_row
        else:
            key_base = tl.load(cu_keys_ptr + sequence, mask=owned, other=0)
            keys = tl.load(cu_keys_ptr + sequence + 1, mask=owned, other=0) - key_base
    if starts_ptr is not None:
        start = tl.maximum(tl.load(starts_ptr + batch), 0)
    query, head, in_tile = tile_rows(tl.arange(0, BLOCK_M), tile, query_begin, query_end, column, GROUP, PACK, BLOCK_M)
    positions_ptr += batch.to(tl.int64) * stride_positions_batch
    position = tl.load(positions_ptr + query, mask=in_tile, other=-1)
    ALIGNED: tl.constexpr = PAGE_SIZE > 0 and PAGE_SIZE % BLOCK_N == 0
    sees, first, last, lowest, begin, middle, unmasked_end, high = visible_keys(
        position, query_offset, keys, start, window, BLOCK_N, ALIGNED
    )

    q_ptr += batch.to(tl.int64) * stride_q_batch
    q_rows = head.to(tl.int64) * stride_q_head + query.to(tl.int64) * stride_q_token  # [BLOCK_M]
    q_mask = in_tile[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + (q_rows[:, None] + offs_d[None, :]), mask=q_mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    if ROTARY_DIM > 0:
        cos_ptr += batch.to(tl.int64) * stride_cos_batch
        sin_ptr += batch.to(tl.int64) * stride_sin_batch
        q = turn_queries(
            q, q_ptr, q_rows, cos_ptr, sin_ptr, position, sees, stride_cos_token, stride_sin_token, ROTARY_DIM,
            INTERLEAVED, BLOCK_M, BLOCK_D,
        )  # fmt: skip
    q, to_bits = scale_queries(q, to_bits, k_scale_ptr, kv_head, stride_k_scale, FP8)
    # 64 bits for the base, 32 inside: wide offsets kept across the key loop cost 40 registers.
    k_ptr += kv_head.to(tl.int64) * stride_k_head
    v_ptr += kv_head.to(tl.int64) * stride_v_head
    if PAGE_SIZE == 0:
        k_ptr += batch.to(tl.int64) * stride_k_batch
        v_ptr += batch.to(tl.int64) * stride_v_batch
        if PACKED:
            k_ptr += key_base.to(tl.int64) * STRIDE_K
            v_ptr += key_base.to(tl.int64) * STRIDE_V

    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    total, peak = starting_point(sinks_ptr, head, in_tile, split, BLOCK_M, SPLIT)
    end = high + 1
    if SPLIT:  # whole blocks, so that the splits' ends are ends of blocks
        blocks = tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N).to(tl.int64)
        split_begin = begin + (blocks * split // splits).to(tl.int32) * BLOCK_N
        end = tl.minimum(end, begin + (blocks * (split + 1) // splits).to(tl.int32) * BLOCK_N)
        begin = split_begin
        middle = tl.minimum(tl.maximum(middle, begin), end)
        unmasked_end = tl.minimum(tl.maximum(unmasked_end, begin), end)
    if window is not None:
        for n in range(begin, tl.minimum(middle, end), BLOCK_N):
            acc, total, peak = attend(
                acc, total, peak, q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, n_pages, batch, kv_head, key_base, n,
                first, last, lowest, high, window, to_bits, cap, stride_k_batch, stride_v_batch, STRIDE_K, STRIDE_V,
                PAGE_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, True, SOFTCAP, FP8, TMA, VENDOR, WIDE, VECTOR,
            )  # fmt: skip
    for n in range(middle, unmasked_end, BLOCK_N):
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, n_pages, batch, kv_head, key_base, n,
            first, last, lowest, high, window, to_bits, cap, stride_k_batch, stride_v_batch, STRIDE_K, STRIDE_V,
            PAGE_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, False, SOFTCAP, FP8, TMA, VENDOR, WIDE, VECTOR,
        )  # fmt: skip
    for n in range(unmasked_end, end, BLOCK_N):
        acc, total, peak = attend(
            acc, total, peak, q, k_ptr, v_ptr, k_desc, v_desc, table_ptr, n_pages, batch, kv_head, key_base, n,
            first, last, lowest, high, window, to_bits, cap, stride_k_batch, stride_v_batch, STRIDE_K, STRIDE_V,
            PAGE_SIZE, HEAD_DIM, BLOCK_D, BLOCK_N, True, SOFTCAP, FP8, TMA, VENDOR, WIDE, VECTOR,
        )  # fmt: skip

    factor = 1.0
    if v_scale_ptr is not None:
        factor = tl.load(v_scale_ptr + kv_head.to(tl.int64) * stride_v_scale).to(tl.float32)
    if FP8 == "e4m3":
        factor *= 256.0
    if SPLIT:
        out = tl.where(sees[:, None], acc * factor, 0.0)
    else:
        out = tl.where(sees[:, None], acc * (factor / tl.where(sees, total, 1.0))[:, None], 0.0)
    # The rows again, from an index that the compiler cannot know to be the same: else it keeps them in registers across
    # the key loops, which costs 40 of them and, on sm_80 with head_dim 128, spills.
    row = tl.arange(0, BLOCK_M) + tl.minimum(selected, 0)
    query, head, in_tile = tile_rows(row, tile, query_begin, query_end, column, GROUP, PACK, BLOCK_M)
    out_ptr += batch.to(tl.int64) * stride_out_batch
    if SPLIT:
        out_ptr += split.to(tl.int64) * stride_out_split
    out_rows = head.to(tl.int64) * stride_out_head + query.to(tl.int64) * stride_out_token
    out_ptrs = out_ptr + out_rows[:, None] + offs_d[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_tile[:, None] & (offs_d < HEAD_DIM)[None, :])
    if lse_ptr is not None:
        lse_rows = batch.to(tl.int64) * stride_lse_batch
        if SPLIT:
            lse_rows += split.to(tl.int64) * stride_lse_split
        lse_rows += head.to(tl.int64) * stride_lse_head + query.to(tl.int64) * stride_lse_token
        if SPLIT:
            tl.store(lse_ptr + lse_rows, tl.where(sees, peak, NOTHING), mask=in_tile)
            tl.store(totals_ptr + lse_rows, tl.where(sees, total, 0.0), mask=in_tile)
        else:
            lse = (peak + tl.math.log2(tl.where(sees, total, 1.0))) * LN_2
            tl.store(lse_ptr + lse_rows, tl.where(sees, lse, NOTHING), mask=in_tile)
