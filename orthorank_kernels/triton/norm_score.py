"""Device functions of the norm with score, which `scoring.py` and `norm_selection.py` share.

`norm_and_score` is the work on tokens of one sequence; `first_piece` and `bounds` say which tokens of which sequences a
program takes. In a kernel:

    seq, token, end = first_piece(...)
    while (token < end) & (seq < n_seqs):
        begin, stop = bounds(..., seq, end)
        if stop > token:
            norm_and_score(..., seq, token, stop, sink_token=begin)
            token = stop
        seq += 1
"""

import triton
import triton.language as tl

from orthorank_kernels.triton.packing import sequences_until
from orthorank_kernels.triton.primitives import norm_row
from orthorank_kernels.triton.score_keys import count_score


@triton.jit
def load_state(x_ptr, residual_ptr, x_offset, residual_offset, channel, inside):
    """One token's hidden state [BLOCK], after the addition of the residual, in the dtype of ``x``."""
    h = tl.load(x_ptr + x_offset + channel, mask=inside, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + residual_offset + channel, mask=inside, other=0.0)
        h = (h.to(tl.float32) + residual.to(tl.float32)).to(h.dtype)
    return h


@triton.jit
def length(x):
    """Euclidean length of a vector, not below what keeps a division by it finite; the bound is PyTorch's."""
    return tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-8)


@triton.jit
def norm_and_score(
    x_ptr,
    residual_ptr,  # None: nothing is added
    weight,  # [BLOCK] or None
    bias,  # [BLOCK] or None
    sink_ptr,  # None: the token `sink_token` after the norm
    normed_ptr,  # None: only scores are wanted
    scores_ptr,
    sum_ptr,  # None, or where h goes
    seq,
    first,
    end,
    sink_token,
    eps,
    stride_x_seq,
    stride_x_token,
    stride_residual_seq,
    stride_residual_token,
    stride_sink_seq,
    stride_out_seq,  # in tokens, of all outputs
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    COSINE: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,  # of the loop's loads, which run ahead of it; None: each is waited for at once
    bins_ptr=None,  # or where the scores are counted, with what `score_keys.count_score` asks
    n_valid=0,
    sink_index=0,
    keep_last=0,
):
    """Tokens ``first`` to ``end`` (exclusive) of one sequence; ``seq``, ``first``, ``end``, ``sink_token`` int64."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < HIDDEN
    x_ptr += seq * stride_x_seq
    if residual_ptr is not None:
        residual_ptr += seq * stride_residual_seq
    if sink_ptr is None:
        state = load_state(
            x_ptr,
            residual_ptr,
            sink_token * stride_x_token,
            sink_token * stride_residual_token,
            channel,
            inside,
        )
        sink = norm_row(state.to(tl.float32), weight, bias, inside, eps, dtype, NORM, OFFSET, HIDDEN)
    else:
        sink = tl.load(sink_ptr + seq * stride_sink_seq + channel, mask=inside, other=0.0)
    if COSINE:
        sink_length = length(sink.to(tl.float32))
    for token in tl.range(first, end, num_stages=STAGES):
        token = tl.cast(token, tl.int64)  # as it is in a compiled kernel; the interpreter counts in Python's ints
        h = load_state(x_ptr, residual_ptr, token * stride_x_token, token * stride_residual_token, channel, inside)
        out = seq * stride_out_seq + token
        if sum_ptr is not None:
            tl.store(sum_ptr + out * HIDDEN + channel, h, mask=inside)
        normed = norm_row(h.to(tl.float32), weight, bias, inside, eps, dtype, NORM, OFFSET, HIDDEN)
        if normed_ptr is not None:
            tl.store(normed_ptr + out * HIDDEN + channel, normed, mask=inside)
        score = tl.abs(tl.sum(normed.to(tl.float32) * sink.to(tl.float32), 0))
        if COSINE:
            score /= sink_length * length(normed.to(tl.float32))
        # A scalar, which one thread stores: rms_norm_select_kernel relies on that.
        tl.store(scores_ptr + out, score)
        if bins_ptr is not None:
            count_score(bins_ptr, score, (token - sink_token).to(tl.int32), n_valid, sink_index, keep_last)


@triton.jit
def first_piece(cu_seqlens_ptr, n_tokens, n_seqs, n_blocks, tokens_each):
    """The sequence with which a program begins, and its tokens: seq, first, end; int64.

    In the packed layout, the tokens may continue in later sequences.
    """
    program = tl.program_id(0).to(tl.int64)
    if cu_seqlens_ptr is None:
        seq = program // n_blocks
        first = program % n_blocks * tokens_each
    else:
        first = program * tokens_each
        seq = sequences_until(0, cu_seqlens_ptr + 1, n_seqs, 1, first, None).to(tl.int64)
    return seq, first, tl.minimum(first + tokens_each, n_tokens)


@triton.jit
def bounds(starts_ptr, cu_seqlens_ptr, seq, end, n_tokens):
    """The first valid token of a sequence, and where its tokens below ``end`` end; int64."""
    if cu_seqlens_ptr is not None:
        begin = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
        end = tl.minimum(tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64), end)
    elif starts_ptr is not None:
        begin = tl.minimum(tl.maximum(tl.load(starts_ptr + seq).to(tl.int64), 0), n_tokens - 1)
    else:
        begin = seq * 0
    return begin, end
