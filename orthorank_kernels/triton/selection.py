"""Exact selection of the k most orthogonal tokens of each row, and its fusion with the norm and the score.

    scores [batch, tokens] float32  ->  positions [batch, width] int32, ascending, -1 past counts [batch] int32

One program selects a row, by the radix selection in `radix.py`: up to 8192 tokens (in the fusion 2048) stay in its
registers, longer rows are streamed in tiles, five times. Two sizes and a tile serve every length, so no prompt length
makes Triton compile anew.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.triton.radix import select_resident, select_streamed
from orthorank_kernels.triton.scoring import bounds, first_piece, load_vector, norm_and_score, norm_arguments


@triton.jit
def select_row(
    scores_ptr,
    positions_ptr,
    counts_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    row_k_ptr,
    row,
    n_tokens,
    k,
    width,
    keep_last,
    stride_scores_row,
    RESIDENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All of one row of the batch (int64): its bounds, its selection, its count, and -1 past that."""
    begin = tl.zeros([], tl.int32)
    if starts_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + row), 0), n_tokens)
    n_valid = n_tokens - begin
    if lengths_ptr is not None:
        n_valid = tl.minimum(tl.maximum(tl.load(lengths_ptr + row), 0), n_valid)
    sink = 0
    if sinks_ptr is not None:
        sink = tl.maximum(tl.load(sinks_ptr + row), -1) - begin
    count = tl.minimum(tl.minimum(k, width), n_valid)
    if row_k_ptr is not None:
        count = tl.minimum(tl.maximum(tl.load(row_k_ptr + row), 0), count).to(tl.int32)
    # Reading starts at the multiple of four below the first valid token: known alignment gives each thread four
    # neighbours, which makes the scans cheap, for any stride and any start.
    first = row * stride_scores_row + begin
    aligned = tl.multiple_of(first // 4 * 4, 4)
    lead = (first - aligned).to(tl.int32)
    scores_ptr += aligned
    positions_ptr += row * width
    if RESIDENT:
        select_resident(scores_ptr, positions_ptr, begin, lead, n_valid, sink, count, keep_last, BLOCK)
    else:
        select_streamed(scores_ptr, positions_ptr, begin, lead, n_valid, sink, count, keep_last, BLOCK)
    tl.store(counts_ptr + row, count)
    for tile in range(count, width, 256):
        slot = tile + tl.arange(0, 256)
        tl.store(positions_ptr + slot, -1, mask=slot < width)


@triton.jit(do_not_specialize=["n_tokens", "k", "width", "keep_last", "stride_scores_row"])
def select_tokens_kernel(
    scores_ptr,
    positions_ptr,
    counts_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    row_k_ptr,
    n_tokens,
    k,
    width,
    keep_last,
    stride_scores_row,
    RESIDENT: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
):
    select_row(
        scores_ptr,
        positions_ptr,
        counts_ptr,
        starts_ptr,
        lengths_ptr,
        sinks_ptr,
        row_k_ptr,
        row=tl.program_id(0).to(tl.int64),
        n_tokens=n_tokens,
        k=k,
        width=width,
        keep_last=keep_last,
        stride_scores_row=stride_scores_row,
        RESIDENT=RESIDENT,
        BLOCK=SELECT_BLOCK,
    )


@triton.jit(do_not_specialize=["n_tokens", "n_seqs", "n_blocks", "rows", "k", "width", "keep_last", "stride_out_row"])
def rms_norm_select_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sink_ptr,
    starts_ptr,
    cu_seqlens_ptr,
    normed_ptr,
    scores_ptr,
    sum_ptr,
    positions_ptr,
    counts_ptr,
    lengths_ptr,
    sinks_ptr,
    row_k_ptr,
    finished_ptr,
    n_tokens,
    n_seqs,
    n_blocks,
    rows,
    eps,
    k,
    width,
    keep_last,
    stride_x_row,
    stride_x_token,
    stride_residual_row,
    stride_residual_token,
    stride_sink_row,
    stride_out_row,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    COSINE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDENT: tl.constexpr,
    SELECT_BLOCK: tl.constexpr,
):
    eps = tl.cast(eps, tl.float32)
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < HIDDEN
    weight = load_vector(weight_ptr, channel, inside)
    bias = load_vector(bias_ptr, channel, inside)
    row, first, end = first_piece(cu_seqlens_ptr, n_tokens, n_seqs, n_blocks, rows)
    begin, end = bounds(starts_ptr, cu_seqlens_ptr, row=row, end=end, n_tokens=n_tokens)
    norm_and_score(
        x_ptr,
        residual_ptr,
        weight,
        bias,
        sink_ptr,
        normed_ptr,
        scores_ptr,
        sum_ptr,
        row=row,
        first=first,
        end=end,
        sink_token=begin,
        eps=eps,
        stride_x_row=stride_x_row,
        stride_x_token=stride_x_token,
        stride_residual_row=stride_residual_row,
        stride_residual_token=stride_residual_token,
        stride_sink_row=stride_sink_row,
        stride_out_row=stride_out_row,
        NORM=NORM,
        OFFSET=OFFSET,
        COSINE=COSINE,
        HIDDEN=HIDDEN,
        BLOCK=BLOCK,
    )
    # The program that counts itself last selects, whichever it is: none waits for another, so any order of execution
    # is right. Release: a score is a scalar, and one thread stores all scalars of a program and does the atomic, so
    # the atomic comes after its own stores. This must stay so: on AMD a barrier does not wait for the stores of other
    # threads to reach memory (gfx942: s_waitcnt lgkmcnt(0), s_barrier), so scores stored by a block of threads would
    # be a race there. Acquire: the last atomic reads a count that continues the releases of all others of the row,
    # and the second barrier puts the loads of all threads after it. So they see every score of the row.
    tl.debug_barrier()
    finished = tl.atomic_add(finished_ptr + row, 1, sem="acq_rel", scope="gpu")
    if finished == n_blocks - 1:
        tl.debug_barrier()
        select_row(
            scores_ptr,
            positions_ptr,
            counts_ptr,
            starts_ptr,
            lengths_ptr,
            sinks_ptr,
            row_k_ptr,
            row=row,
            n_tokens=n_tokens,
            k=k,
            width=width,
            keep_last=keep_last,
            stride_scores_row=n_tokens,
            RESIDENT=RESIDENT,
            BLOCK=SELECT_BLOCK,
        )


# Tokens that so many warps hold in registers, and the tile of longer rows. The fusion takes smaller tiles, for fewer
# registers: more rows are normed at once.
RESIDENT_SIZES = ((2048, 8), (8192, 16))
STREAM_TILE = (2048, 16)
FUSED_TILE_PER_WARP = 64


def occupied(batch: int, tokens: int, stride: int) -> int:
    """Elements that a row takes in registers, counted from the multiple of four below its first valid token."""
    return tokens if batch == 1 or stride % 4 == 0 else tokens + 3


def select_settings(elements: int) -> dict[str, int | bool]:
    """Settings of the selection alone, for rows that occupy so many ``elements``."""
    for size, warps in RESIDENT_SIZES:
        if elements <= size:
            return {"RESIDENT": True, "SELECT_BLOCK": size, "num_warps": warps}
    size, warps = STREAM_TILE
    return {"RESIDENT": False, "SELECT_BLOCK": size, "num_warps": warps}


def fused_settings(elements: int, num_warps: int) -> dict[str, int | bool]:
    """Settings of the selection after the norm, which chooses the warps."""
    size = RESIDENT_SIZES[0][0]
    if elements <= size:
        return {"RESIDENT": True, "SELECT_BLOCK": size}
    return {"RESIDENT": False, "SELECT_BLOCK": FUSED_TILE_PER_WARP * num_warps}


def select_tokens(
    scores: torch.Tensor,
    k: int,
    row_k: torch.Tensor | None,
    width: int,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sink_positions: torch.Tensor | None,
    keep_last: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launcher of the operator ``select_tokens``; arguments are checked in the public function."""
    batch, tokens = scores.shape
    positions = scores.new_empty(batch, width, dtype=torch.int32)
    counts = scores.new_empty(batch, dtype=torch.int32)
    if batch == 0:
        return positions, counts
    settings = select_settings(occupied(batch, tokens, scores.stride(0)))
    with torch.cuda.device_of(scores):
        select_tokens_kernel[(batch,)](
            scores_ptr=scores,
            positions_ptr=positions,
            counts_ptr=counts,
            starts_ptr=starts,
            lengths_ptr=lengths,
            sinks_ptr=sink_positions,
            row_k_ptr=row_k,
            n_tokens=tokens,
            k=k,
            width=width,
            keep_last=keep_last,
            stride_scores_row=scores.stride(0),
            enable_fp_fusion=True,
            **settings,
        )
    return positions, counts


def rms_norm_select(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    k: int,
    row_k: torch.Tensor | None,
    width: int,
    sink: torch.Tensor | None,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sink_positions: torch.Tensor | None,
    keep_last: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launcher of the operator ``rms_norm_select``; arguments are checked in the public function."""
    batch, tokens, _ = hidden_states.shape
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    scores = hidden_states.new_empty(batch, tokens, dtype=torch.float32)
    if scores.numel() == 0:
        return normed, scores, *select_tokens(scores, k, row_k, width, starts, lengths, sink_positions, keep_last)
    positions = hidden_states.new_empty(batch, width, dtype=torch.int32)
    counts = hidden_states.new_empty(batch, dtype=torch.int32)
    finished = hidden_states.new_zeros(batch, dtype=torch.int32)
    programs, arguments = norm_arguments(
        hidden_states,
        weight,
        eps,
        residual=None,
        norm="rms",
        bias=None,
        weight_offset=0.0,
        score="inner",
        sink=sink,
        starts=starts,
        cu_seqlens=None,
        normed=normed,
        scores=scores,
        summed=None,
    )
    with torch.cuda.device_of(hidden_states):
        rms_norm_select_kernel[(programs,)](
            **arguments,
            positions_ptr=positions,
            counts_ptr=counts,
            lengths_ptr=lengths,
            sinks_ptr=sink_positions,
            row_k_ptr=row_k,
            finished_ptr=finished,
            k=k,
            width=width,
            keep_last=keep_last,
            **fused_settings(occupied(batch, tokens, tokens), arguments["num_warps"]),
        )
    return normed, scores, positions, counts
