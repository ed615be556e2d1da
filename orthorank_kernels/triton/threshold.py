"""Device functions of the selection by a threshold: the tokens that score less, in position order.

One scan of a tile compacts it. The last ``keep_last`` tokens are always taken, the sink and NaN scores never.
"""

import triton
import triton.language as tl

from orthorank_kernels.triton.packing import SEQUENCES, count_below, fill_missing, sink_of


@triton.jit
def is_taken(score, threshold, token, n_valid, sink, keep_last):
    """Which of the valid tokens ``token`` [TILE], counted from the first valid one, are selected."""
    return (token != sink) & ((score < threshold) | (token >= n_valid - keep_last))  # NaN is less than nothing


@triton.jit
def select_below(
    scores_ptr, positions_ptr, first, begin, n_valid, sink, threshold, width, keep_last, TILE: tl.constexpr
):
    """Select from one sequence of a batch, whose valid scores begin ``first`` (int64) elements from ``scores_ptr``.

    ``begin`` is the position of the first valid token. Returns the number of tokens written, at most ``width``.
    """
    aligned = tl.multiple_of(first // 4 * 4, 4)  # as in `radix.select_smallest`
    lead = (first - aligned).to(tl.int32)
    scores_ptr += aligned
    count = 0
    for tile in range(0, n_valid + lead, TILE):
        index = tile + tl.arange(0, TILE)  # [TILE]
        token = index - lead
        valid = token.to(tl.uint32) < n_valid.to(tl.uint32)  # false for negative tokens too
        score = tl.load(scores_ptr + index, mask=valid, other=0.0)
        taken = valid & is_taken(score, threshold, token, n_valid, sink, keep_last)
        slot = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(positions_ptr + slot, begin + token, mask=taken & (slot < width))
        count += tl.sum(taken.to(tl.int32), 0)
    return tl.minimum(count, width)


@triton.jit
def select_below_packed(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    counts_ptr,
    cu_selected_ptr,
    sinks_ptr,
    seq_threshold_ptr,
    cu_seqlens_ptr,
    offsets_ptr,
    n_seqs,
    threshold,
    width,
    keep_last,
    TILE: tl.constexpr,
):
    """Select from all packed sequences, in one program: how many one selects decides where the next one begins."""
    n_tokens = tl.load(cu_seqlens_ptr + n_seqs)
    count = 0
    seq_first = 0  # sequence of the tile's first token
    for tile in range(0, n_tokens, TILE):
        row = tile + tl.arange(0, TILE)  # [TILE]
        inside = row < n_tokens
        row = tl.minimum(row, n_tokens - 1)
        # The search takes as many steps as the tile has sequences to choose from: none inside a long one.
        ends_ptr = cu_seqlens_ptr + 1 + seq_first
        more = count_below(ends_ptr, n_seqs - 1 - seq_first, tl.minimum(tile + TILE, n_tokens))
        seq = seq_first + count_below(ends_ptr, more, row + 1)
        begin = tl.load(cu_seqlens_ptr + seq)
        token = row - begin
        n_valid = tl.load(cu_seqlens_ptr + seq + 1) - begin
        sink = sink_of(sinks_ptr, offsets_ptr, seq)
        bound = threshold
        if seq_threshold_ptr is not None:
            bound = tl.load(seq_threshold_ptr + seq)
        taken = inside & is_taken(tl.load(scores_ptr + row), bound, token, n_valid, sink, keep_last)
        slot = count + tl.cumsum(taken.to(tl.int32), 0) - 1
        written = taken & (slot < width)
        position = token
        if offsets_ptr is not None:
            position += tl.load(offsets_ptr + seq)
        tl.store(positions_ptr + slot, position, mask=written)
        tl.store(rows_ptr + slot, row, mask=written)
        count += tl.sum(taken.to(tl.int32), 0)
        seq_first += more
    count = tl.minimum(count, width)
    fill_missing(positions_ptr, rows_ptr, count, width)
    # Rows ascend, so a search among them counts the selected of the sequences before each. The barrier orders the
    # stores before these loads: the threads of a program share a cache, so nothing more is needed.
    tl.debug_barrier()
    tl.store(cu_selected_ptr, 0)
    for tile in range(0, n_seqs, SEQUENCES):
        # Threads past the last sequence repeat it: masks would cost AMD's scalar registers.
        seq = tl.minimum(tile + tl.arange(0, SEQUENCES), n_seqs - 1)  # [SEQUENCES]
        first = count_below(rows_ptr, count, tl.load(cu_seqlens_ptr + seq))
        last = count_below(rows_ptr, count, tl.load(cu_seqlens_ptr + seq + 1))
        tl.store(counts_ptr + seq, last - first)
        tl.store(cu_selected_ptr + 1 + seq, last)
