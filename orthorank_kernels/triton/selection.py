"""Exact selection of tokens: the k of smallest score in each row, or all that score less than a threshold.

    scores [batch, tokens] float32  ->  positions [batch, width] int32, ascending, -1 past counts [batch] int32
    scores [total] float32          ->  positions, rows [width] int32, ascending, -1 past cu_selected[-1]

With k, one program selects from one sequence, by the radix selection in `radix.py`: up to 8192 tokens stay in its
registers, longer ones are streamed in tiles, four times to find the k-th score and once to write. Two sizes and a tile
serve every length, so no prompt length makes Triton compile anew. Packed outputs have no gaps, and still no program
waits for another: where a sequence begins follows from the lengths and k alone (`packing.py`). By a threshold that
depends on the scores; there one program compacts all sequences, tile after tile (`threshold.py`).

Bytes: 4 of each token's score, read once up to 8192 tokens and five times (four of them from L2) beyond, and 4 of each
selected position (8 packed). Besides, each program of a packed selection reads all of ``cu_seqlens`` and k, 12 bytes a
sequence, from L2: 0.8 MB in all for 256 sequences.

Why so: digits of eight bits make four levels and 256 bins, one for each thread, which one scan and one reduction walk;
the histogram is `tl.histogram`, shared-memory atomics that do not mind how concentrated a digit is. Whole rows on one
program need one launch and no memory between programs, and a row of 2048 takes an estimated 4 us beside a layer's
milliseconds; several programs for a row would begin to pay at some 128k tokens. Known alternatives cost more: sorting
networks 16,000 instructions at 2048 tokens, selection by bins 2.8 times the bytes and ties out of order.

Compiled for sm_80 / sm_90 / sm_100 / gfx942, without spills:

=============================  ===================  =========================
case                           registers            instructions
=============================  ===================  =========================
k of 2048, 8 warps             45 / 46 / 47 / 58    722 / 756 / 772 / 787
k of 40000, 16 warps           60 / 63 / 71 / 68    763 / 830 / 842 / 962
k, packed, 16 warps            96 / 106 / 106 / 80  2323 / 2510 / 2538 / 2568
threshold, 2048, 8 warps       64 / 70 / 70 / 45    506 / 538 / 537 / 394
threshold, packed, 16 warps    64 / 52 / 52 / 44    687 / 758 / 763 / 516
=============================  ===================  =========================

Tried and lost: unrolling the four levels (three times the code); a packed threshold in tiles of 4096 (82 registers, and
on AMD 25 scalar registers spilled: each mask takes one or two, which is also why the searches clamp instead of mask);
a setting for few packed tokens (another compilation, for tokens that say little about how long a sequence is).
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.layout import selection_outputs
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import launch, target_of
from orthorank_kernels.triton.packing import fill_missing, quotas_around, sink_of, write_quotas
from orthorank_kernels.triton.radix import select_smallest
from orthorank_kernels.triton.threshold import select_below, select_below_packed


@triton.jit
def valid_part(starts_ptr, lengths_ptr, sinks_ptr, seq, n_tokens, LARGEST: tl.constexpr = False):
    """Of a sequence of the batch: its first valid token, how many there are, and the sink's index among them; int32."""
    begin = tl.zeros([], tl.int32)
    if starts_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + seq), 0), n_tokens)
    n_valid = n_tokens - begin
    if lengths_ptr is not None:
        n_valid = tl.minimum(tl.maximum(tl.load(lengths_ptr + seq), 0), n_valid)
    sink = -1 if LARGEST else 0
    if sinks_ptr is not None:
        sink = tl.maximum(tl.load(sinks_ptr + seq), -1) - begin
    return begin, n_valid, sink


@triton.jit
def select_in_batch(
    scores_ptr,
    positions_ptr,
    counts_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    seq_k_ptr,
    seq_threshold_ptr,
    seq,
    n_tokens,
    k,
    threshold,
    width,
    keep_last,
    stride_scores_seq,
    THRESHOLD: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr = False,
    RELATIVE: tl.constexpr = False,
    bins_ptr=None,
):
    """All of one sequence of the batch (int64): its bounds, its selection, its count, and -1 past that."""
    begin, n_valid, sink = valid_part(starts_ptr, lengths_ptr, sinks_ptr, seq, n_tokens, LARGEST)
    first = seq * stride_scores_seq + begin
    positions_ptr += seq * width
    if THRESHOLD:
        if seq_threshold_ptr is not None:
            threshold = tl.load(seq_threshold_ptr + seq)
        count = select_below(scores_ptr, positions_ptr, first, begin, n_valid, sink, threshold, width, keep_last, TILE)
    else:
        count = tl.minimum(tl.minimum(k, width), n_valid)
        if seq_k_ptr is not None:
            count = tl.minimum(tl.maximum(tl.load(seq_k_ptr + seq), 0), count).to(tl.int32)
        position = 0 if RELATIVE else begin
        select_smallest(
            scores_ptr,
            positions_ptr,
            None,
            bins_ptr,
            first,
            position,
            0,
            n_valid,
            sink,
            count,
            keep_last,
            RESIDENT,
            TILE,
            LARGEST,
        )
    tl.store(counts_ptr + seq, count)
    fill_missing(positions_ptr, None, count, width)


@triton.jit
def select_sequence(
    scores_ptr,
    positions_ptr,
    rows_ptr,
    sinks_ptr,
    seq_k_ptr,
    cu_seqlens_ptr,
    offsets_ptr,
    seq,
    n_seqs,
    k,
    width,
    keep_last,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
):
    """The k smallest of one packed sequence (int64), and its share of the -1: the slots numbered like its tokens."""
    begin = tl.load(cu_seqlens_ptr + seq)
    end = tl.load(cu_seqlens_ptr + seq + 1)
    before, count, total = quotas_around(cu_seqlens_ptr, seq_k_ptr, seq, n_seqs, k)
    slot = tl.minimum(before, width)
    count = tl.minimum(count, width - slot)
    if count > 0:
        position = tl.zeros([], tl.int32)
        if offsets_ptr is not None:
            position = tl.load(offsets_ptr + seq)
        select_smallest(
            scores_ptr,
            positions_ptr + slot,
            rows_ptr + slot,
            None,
            begin.to(tl.int64),
            position,
            begin,
            end - begin,
            sink_of(sinks_ptr, offsets_ptr, seq),
            count,
            keep_last,
            RESIDENT,
            TILE,
        )
    fill_missing(positions_ptr, rows_ptr, tl.maximum(total, begin), tl.minimum(end, width))


@triton.jit(do_not_specialize=["n_seqs", "n_tokens", "k", "width", "keep_last", "stride_scores_seq"])
def select_tokens_kernel(
    scores_ptr,
    positions_ptr,
    counts_ptr,
    rows_ptr,
    cu_selected_ptr,
    starts_ptr,
    lengths_ptr,
    sinks_ptr,
    seq_k_ptr,
    seq_threshold_ptr,
    cu_seqlens_ptr,
    offsets_ptr,
    n_seqs,
    n_tokens,
    k,
    threshold,
    width,
    keep_last,
    stride_scores_seq,
    THRESHOLD: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    threshold = tl.cast(threshold, tl.float32)
    if cu_seqlens_ptr is None:
        select_in_batch(
            scores_ptr,
            positions_ptr,
            counts_ptr,
            starts_ptr,
            lengths_ptr,
            sinks_ptr,
            seq_k_ptr,
            seq_threshold_ptr,
            seq=seq,
            n_tokens=n_tokens,
            k=k,
            threshold=threshold,
            width=width,
            keep_last=keep_last,
            stride_scores_seq=stride_scores_seq,
            THRESHOLD=THRESHOLD,
            RESIDENT=RESIDENT,
            TILE=TILE,
            LARGEST=LARGEST,
            RELATIVE=RELATIVE,
        )
    elif THRESHOLD:
        select_below_packed(
            scores_ptr,
            positions_ptr,
            rows_ptr,
            counts_ptr,
            cu_selected_ptr,
            sinks_ptr,
            seq_threshold_ptr,
            cu_seqlens_ptr,
            offsets_ptr,
            n_seqs=n_seqs,
            threshold=threshold,
            width=width,
            keep_last=keep_last,
            TILE=TILE,
        )
    else:
        if seq == 0:
            write_quotas(
                positions_ptr, rows_ptr, counts_ptr, cu_selected_ptr, cu_seqlens_ptr, seq_k_ptr, n_seqs, k, width
            )
        if seq < n_seqs:
            select_sequence(
                scores_ptr,
                positions_ptr,
                rows_ptr,
                sinks_ptr,
                seq_k_ptr,
                cu_seqlens_ptr,
                offsets_ptr,
                seq=seq,
                n_seqs=n_seqs,
                k=k,
                width=width,
                keep_last=keep_last,
                RESIDENT=RESIDENT,
                TILE=TILE,
            )


def occupied(batch: int, tokens: int, stride: int) -> int:
    """Elements that a row takes in registers, counted from the multiple of four below its first valid token."""
    return tokens if batch == 1 or stride % 4 == 0 else tokens + 3


def select_settings(elements: int, packed: bool, by_threshold: bool, target: str) -> dict[str, int | bool]:
    """Settings of the selection, for rows that occupy so many ``elements``, or packed sequences that all do.

    ``tokens`` are those that a program holds in registers, as a whole row or a tile of it. Packed sequences have one
    setting for all numbers of tokens, which say little about their lengths; of AMD, where the compiler runs out of
    scalar registers, which hold its masks, one of its own.
    """
    kind = ", threshold" if by_threshold else ""
    chosen = _settings.look_up("select_tokens", f"packed{kind}" if packed else f"short rows{kind}", target)
    if not packed and elements > chosen["tokens"]:
        chosen = _settings.look_up("select_tokens", f"long rows{kind}", target)
    tile = chosen["tokens"]
    if by_threshold:
        return {"THRESHOLD": True, "RESIDENT": 0, "TILE": tile, "num_warps": chosen["num_warps"]}
    if packed:
        resident = _settings.look_up("select_tokens", "long rows", target)["tokens"]
        return {"THRESHOLD": False, "RESIDENT": resident, "TILE": tile, "num_warps": chosen["num_warps"]}
    if elements <= tile:
        return {"THRESHOLD": False, "RESIDENT": tile, "TILE": 0, "num_warps": chosen["num_warps"]}
    chosen = _settings.look_up("select_tokens", "streamed rows", target)
    return {"THRESHOLD": False, "RESIDENT": 0, "TILE": chosen["tokens"], "num_warps": chosen["num_warps"]}


def select_tokens(
    scores: torch.Tensor,
    k: int | None,
    seq_k: torch.Tensor | None,
    threshold: float | None,
    seq_threshold: torch.Tensor | None,
    width: int,
    starts: torch.Tensor | None,
    lengths: torch.Tensor | None,
    sink_positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    position_offsets: torch.Tensor | None,
    keep_last: int,
    largest: bool = False,
    relative: bool = False,
    out: tuple[torch.Tensor | None, ...] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Launcher of the operator ``select_tokens``; arguments are checked in the public function."""
    packed, by_threshold = cu_seqlens is not None, k is None
    tokens = scores.shape[-1]
    n_seqs = cu_seqlens.shape[0] - 1 if packed else scores.shape[0]
    stride = 1 if packed else scores.stride(0)  # packed sequences may begin anywhere
    out = selection_outputs(scores, width, cu_seqlens) if out is None else out
    positions, counts, row_indices, cu_selected = out
    programs = 1 if packed and by_threshold else max(n_seqs, packed)
    if programs == 0:
        return out
    settings = select_settings(occupied(n_seqs, tokens, stride), packed, by_threshold, target_of(scores.device))
    launch(
        select_tokens_kernel,
        (programs,),
        scores,
        scores_ptr=scores,
        positions_ptr=positions,
        counts_ptr=counts,
        rows_ptr=row_indices if packed else None,
        cu_selected_ptr=cu_selected if packed else None,
        starts_ptr=starts,
        lengths_ptr=lengths,
        sinks_ptr=sink_positions,
        seq_k_ptr=seq_k,
        seq_threshold_ptr=seq_threshold,
        cu_seqlens_ptr=cu_seqlens,
        offsets_ptr=position_offsets,
        n_seqs=n_seqs,
        n_tokens=tokens,
        k=k or 0,
        threshold=threshold or 0.0,
        width=width,
        keep_last=keep_last,
        stride_scores_seq=stride,
        LARGEST=largest,
        RELATIVE=relative,
        enable_fp_fusion=True,
        **settings,
    )
    return out
