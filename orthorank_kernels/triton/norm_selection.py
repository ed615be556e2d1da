"""Norm, score and selection in one launch: the program that scores the last token of a sequence also selects from it.

    h, normed, scores of all tokens as in `scoring`; positions, counts, rows, cu_selected as in `selection`

Every program norms and scores its tokens, then counts them; see `is_last`. Beside the two launches one after the other
this saves one, and the wait between them. With a threshold and packed sequences, one count of all tokens decides, and
one program compacts them when the others are done: an estimated microsecond for each tile of 1024.

Long rows of a batch are counted as they are scored: the thread that stores a score adds it to a histogram in the
workspace, if there is room (`score_keys`). The selecting program then reads the row twice, once for the keys in the
k-th token's bin and once to write, with the 4 KB of counts 2.05 times at 32768 tokens instead of five; rows of which a
bin holds more than 1024 (from some 100,000 tokens on, or many equal scores) are read for each digit as before. Atomics
of one program go to few addresses in L2 and wait for nothing. Bins for packed sequences, and twice as many bins, cost
all programs registers: `docs/writing-kernels.md`.

All programs norm and only few select, so the selection may not take registers that the norm does not need. Hence the
norm ends before the counting begins, for all sequences of a program: selecting inside that loop kept weight and sink
alive, then 95 registers instead of 56 on sm_90, and half as many programs at a time. Hence also the small tiles:
resident packed sequences of 1024 and 2048 tokens took 80 and 104 registers, and spilled on sm_100 and AMD.

Compiled for 4096 channels in bfloat16 and 2048 tokens, 8 warps, for sm_80 / sm_90 / sm_100 / gfx942, without spills:
62 / 58 / 60 / 59 registers for a batch, 64 / 64 / 64 / 61 where long rows are counted; 64 / 80 / 80 / 90 for packed
sequences. The norm alone takes 55 on sm_90. Spilled once, in the selection: with counted rows on sm_90
and sm_100 6 registers of 4096 channels and 2 or 4 of 576, for some other channels in a packed selection 2 to 6, with 16
warps on AMD up to 26 scalar ones.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from orthorank_kernels.layout import SCORE_BINS, norm_outputs, selection_outputs
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import launch, scratch, target_of
from orthorank_kernels.triton.norm_score import bounds, first_piece, norm_and_score
from orthorank_kernels.triton.packing import write_quotas
from orthorank_kernels.triton.score_keys import SCORES
from orthorank_kernels.triton.scoring import norm_arguments
from orthorank_kernels.triton.selection import occupied, select_in_batch, select_sequence, select_tokens, valid_part
from orthorank_kernels.triton.threshold import select_below_packed


@triton.jit
def is_last(done_ptr, done, total):
    """Count ``done`` more tokens; whether they are the last of ``total``. Then the counter is back at zero.

    The program that counts the last tokens goes on to select, whichever it is: none waits for another, so any order of
    execution is right.

    Release: a score is a scalar, and one thread stores all scalars of a program, counts scores in their bins and does
    the atomic, so the atomic comes after its own stores. This must stay so: on AMD a barrier does not wait for the
    stores of other threads to reach memory (gfx942: s_waitcnt lgkmcnt(0), s_barrier), so scores stored by a block of
    threads would be a race there. Acquire: the last atomic reads a count that continues the releases of all others, and
    the second barrier puts the loads of all threads after it. So they see every score that was counted. No program
    counts here again in this launch, so the zero is an ordinary store, which the next launch sees.
    """
    tl.debug_barrier()
    before = tl.atomic_add(done_ptr, done.to(tl.int32), sem="acq_rel", scope="gpu")
    last = before + done == total
    if last:
        tl.debug_barrier()
        tl.store(done_ptr, 0)
    return last


@triton.jit
def bins_of(done_ptr, seq, n_seqs):
    """Where the scores of a sequence (int64) are counted."""
    return done_ptr + n_seqs + seq * SCORES


@triton.jit(
    do_not_specialize=["n_tokens", "n_seqs", "n_blocks", "tokens_each", "k", "width", "keep_last", "stride_out_seq"],
)
def rms_norm_select_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    sink_ptr,
    starts_ptr,
    cu_seqlens_ptr,  # None in the batch layout
    normed_ptr,
    scores_ptr,
    sum_ptr,
    positions_ptr,
    counts_ptr,
    rows_ptr,
    cu_selected_ptr,
    lengths_ptr,
    sinks_ptr,
    seq_k_ptr,
    seq_threshold_ptr,
    offsets_ptr,
    done_ptr,  # tokens scored so far: of each sequence; of all sequences where a threshold selects; then bins
    n_tokens,  # of a sequence of the batch, or of all sequences
    n_seqs,
    n_blocks,
    tokens_each,
    eps,
    k,
    threshold,
    width,
    keep_last,
    stride_x_seq,
    stride_x_token,
    stride_residual_seq,
    stride_residual_token,
    stride_sink_seq,
    stride_out_seq,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    COSINE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    THRESHOLD: tl.constexpr,
    RESIDENT: tl.constexpr,
    TILE: tl.constexpr,
    BINNED: tl.constexpr,
):
    eps = tl.cast(eps, tl.float32)
    threshold = tl.cast(threshold, tl.float32)
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < HIDDEN
    weight = None if weight_ptr is None else tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = None if bias_ptr is None else tl.load(bias_ptr + channel, mask=inside, other=0.0)
    if cu_seqlens_ptr is not None:
        if not THRESHOLD:
            if tl.program_id(0).to(tl.int64) == 0:
                write_quotas(
                    positions_ptr, rows_ptr, counts_ptr, cu_selected_ptr, cu_seqlens_ptr, seq_k_ptr, n_seqs, k, width
                )
    first_seq, first, end = first_piece(cu_seqlens_ptr, n_tokens, n_seqs, n_blocks, tokens_each)
    seq = first_seq
    token = first
    # Once in the batch layout; in the packed one, once for each sequence that has tokens here, and each empty one
    # between them.
    while (token < end) & (seq < n_seqs):
        begin, stop = bounds(starts_ptr, cu_seqlens_ptr, seq=seq, end=end, n_tokens=n_tokens)
        if stop > token:
            bins_ptr = None
            n_valid, sink_index = 0, 0
            if BINNED:
                bins_ptr = bins_of(done_ptr, seq, n_seqs)
                _, n_valid, sink_index = valid_part(starts_ptr, lengths_ptr, sinks_ptr, seq, n_tokens)
            norm_and_score(
                x_ptr,
                residual_ptr,
                weight,
                bias,
                sink_ptr,
                normed_ptr,
                scores_ptr,
                sum_ptr,
                seq=seq,
                first=token,
                end=stop,
                sink_token=begin,
                eps=eps,
                stride_x_seq=stride_x_seq,
                stride_x_token=stride_x_token,
                stride_residual_seq=stride_residual_seq,
                stride_residual_token=stride_residual_token,
                stride_sink_seq=stride_sink_seq,
                stride_out_seq=stride_out_seq,
                NORM=NORM,
                OFFSET=OFFSET,
                COSINE=COSINE,
                HIDDEN=HIDDEN,
                BLOCK=BLOCK,
                STAGES=STAGES,
                bins_ptr=bins_ptr,
                n_valid=n_valid,
                sink_index=sink_index,
                keep_last=keep_last,
            )
            token = stop
        seq += 1
    if cu_seqlens_ptr is None:
        if is_last(done_ptr + first_seq, end - first, n_tokens):
            select_in_batch(
                scores_ptr,
                positions_ptr,
                counts_ptr,
                starts_ptr,
                lengths_ptr,
                sinks_ptr,
                seq_k_ptr,
                seq_threshold_ptr,
                seq=first_seq,
                n_tokens=n_tokens,
                k=k,
                threshold=threshold,
                width=width,
                keep_last=keep_last,
                stride_scores_seq=n_tokens,
                THRESHOLD=THRESHOLD,
                RESIDENT=RESIDENT,
                TILE=TILE,
                bins_ptr=bins_of(done_ptr, first_seq, n_seqs) if BINNED else None,
            )
    elif THRESHOLD:
        if is_last(done_ptr, end - first, n_tokens):
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
        behind = seq
        seq = first_seq
        while seq < behind:  # the sequences that had tokens here
            seq_begin = tl.load(cu_seqlens_ptr + seq)
            seq_end = tl.load(cu_seqlens_ptr + seq + 1)
            done = tl.minimum(seq_end, end) - tl.maximum(seq_begin, first)
            if done > 0:
                if is_last(done_ptr + seq, done, seq_end - seq_begin):
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
            seq += 1


def select_settings(
    elements: int, packed: bool, by_threshold: bool, num_warps: int, target: str
) -> dict[str, int | bool]:
    """Settings of the selection after the norm, which chooses the warps.

    The fusion takes smaller tiles than the selection alone, so that it needs no more registers than the norm, and as
    many tokens are normed at once: so many tokens for each warp. Packed sequences of one tile stay in registers.
    """

    def tokens(kind: str) -> int:
        return _settings.look_up("rms_norm_select", kind, target)["tokens"]

    if by_threshold:
        return {"THRESHOLD": True, "RESIDENT": 0, "TILE": tokens("threshold, for each warp") * num_warps}
    if packed:
        tile = tokens("packed, for each warp") * num_warps
        return {"THRESHOLD": False, "RESIDENT": tile, "TILE": tile}
    resident = tokens("short rows")
    if elements <= resident:
        return {"THRESHOLD": False, "RESIDENT": resident, "TILE": 0}
    return {"THRESHOLD": False, "RESIDENT": 0, "TILE": tokens("streamed rows, for each warp") * num_warps}


def rms_norm_select(
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    norm: str,
    bias: torch.Tensor | None,
    weight_offset: float,
    score: str,
    sink: torch.Tensor | None,
    write_norm: bool,
    copy_input: bool,
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
    workspace: torch.Tensor | None,
    out: tuple[Any, ...] | None = None,
) -> tuple[Any, ...]:
    """Launcher of the operator ``rms_norm_select``; arguments are checked in the public function."""
    if out is None:
        out = (
            *norm_outputs(hidden_states, residual, norm, write_norm, copy_input),
            *selection_outputs(hidden_states, width, cu_seqlens),
        )
    normed, scores, summed, positions, counts, row_indices, cu_selected = out
    request = (starts, lengths, sink_positions, cu_seqlens, position_offsets, keep_last)
    if scores.numel() == 0:
        select_tokens(scores, k, seq_k, threshold, seq_threshold, width, *request, out=out[3:])
        return out
    packed, by_threshold = cu_seqlens is not None, k is None
    tokens = scores.shape[-1]
    n_seqs = cu_seqlens.shape[0] - 1 if packed else scores.shape[0]
    programs, arguments = norm_arguments(
        hidden_states,
        weight,
        eps,
        residual,
        norm,
        bias,
        weight_offset,
        score,
        sink,
        starts,
        cu_seqlens,
        normed=normed if write_norm and norm != "identity" else None,
        scores=scores,
        summed=summed if residual is not None or copy_input else None,
    )
    settings = select_settings(
        occupied(n_seqs, tokens, tokens), packed, by_threshold, arguments["num_warps"], target_of(scores.device)
    )
    counters = max(n_seqs, 1)
    bins = 0 if packed or by_threshold or settings["RESIDENT"] else n_seqs * SCORE_BINS
    if workspace is None:
        workspace = scratch(hidden_states, (counters + bins,), torch.int32, zeros=True)
    launch(
        rms_norm_select_kernel,
        (programs,),
        hidden_states,
        **arguments,
        **settings,
        positions_ptr=positions,
        counts_ptr=counts,
        rows_ptr=row_indices if packed else None,
        cu_selected_ptr=cu_selected if packed else None,
        lengths_ptr=lengths,
        sinks_ptr=sink_positions,
        seq_k_ptr=seq_k,
        seq_threshold_ptr=seq_threshold,
        offsets_ptr=position_offsets,
        done_ptr=workspace,
        BINNED=bins > 0 and workspace.shape[0] >= counters + bins,
        k=k or 0,
        threshold=threshold or 0.0,
        width=width,
        keep_last=keep_last,
    )
    return out
