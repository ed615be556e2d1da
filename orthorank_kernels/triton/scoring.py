"""The norm fused with the residual add before it and the sink score after it.

    h[t, :]      = x[t, :] + residual[t, :]                  rounded to the dtype; x alone without a residual
    normed[t, :] = norm(h[t, :]) * weight + bias             RMSNorm, LayerNorm, or h as it is
    scores[t]    = |<sink, normed[t, :]>|                    float32; or divided by both lengths (cosine)

Layouts, one kernel: batch ``[batch, tokens, HIDDEN]``, and packed ``[total, HIDDEN]`` with ``cu_seqlens``. In the
packed layout the strides of sequences are 0 and tokens count through all of them, so a sequence is one of a batch that
starts later. A program may take the end of one sequence and the beginning of others; it reads the sink anew for each.

A token's state lives in registers as one block, so a hidden size above 16384 is right but spills.

Bytes. The fewest are one read of x (and the residual), one write of each output, and the vectors once: for a token of
4096 in bfloat16 16 KB, or 32 KB with a residual. A program normalises several tokens and holds weight, bias and sink
meanwhile, so what it reads beside the tokens is divided by ``tokens_each``. The launcher takes as many as make that
1/16 of the traffic (``shared_part``): 16 tokens for x, normed, weight and sink, 32 if no norm is written, 8 with a
residual.
Counted with that many: 1.05 to 1.07 times the fewest in every layout, sequences of one token included. Few tokens are
spread over 2048 programs (``enough_programs``; an H100 runs 528 at a time) and read the vectors more often, mostly from
L2. States of 16 bits are copied to shared memory ahead of the loop over tokens (``STAGES``), so that an SM of an H100
always has 48 KB or more on their way; `docs/writing-kernels.md` has the figures, and what lost. Elsewhere the other
programs on the multiprocessor fill the gap. Registers matter all the same:

    registers at 4096, bfloat16, 8 warps, no spills        sm_80   sm_90   sm_100   gfx942
    RMSNorm and score, batch                                  56      55      56       46
    the same with a residual, sink from its own token         59      56      60       43
    packed, residual, stored sinks                            64      63      64       60
    scores of the hidden states, no norm                      38      39      36       28
    1 + weight and cosine, one after the other                76      64      72       40
    LayerNorm with bias, scores alone                         93      93      92       51
    packed LayerNorm, residual, own sink, cosine, one by one  91      93      96       69

Up to 64, four programs share a multiprocessor, up to 80 three. Weight, bias and sink are loaded in 16 bits, but the
compiler moves their conversion to float32 out of the loop. Tried against that, and left: a limit on registers (64
costs LayerNorm 20 spills, and packed variants of 8192 up to 127), `disable_licm` (LayerNorm takes 64 on sm_90, but 94
on sm_80, and older Tritons lack it), 16 warps (54 registers, but two programs), inline assembly that hides the
conversion (64, on NVIDIA alone). At 8192, with 16 warps, packed variants take 63 to 126 registers, so a
multiprocessor may have one program where it has two of the batch layout (64: ``TWO_PROGRAMS``).

A packed program finds its first sequence by counting, 256 entries of ``cu_seqlens`` at a time: n_seqs / 256 loads that
all programs share, where a bisection would be log2(n_seqs) loads that wait for each other. In the kernel the walk over
sequences is one ``while`` for both layouts (once around in the batch layout), so that the body is compiled once.

Without fused multiply-adds (`enable_fp_fusion`): a sum over channels ends in shuffles between lanes, and the compiler
would fuse a product into the first exchange, x * x + (the other lane's x * x, rounded). Then the two lanes of a pair
hold different last bits of one sum, and which of them a program stores is left to the hardware. Equal states must have
equal scores, since the ranks of a tensor-parallel group select by them. The kernel waits for memory, so the
instructions that fusing would save cost nothing.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from orthorank_kernels.layout import norm_outputs
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import cdiv, family, launch, next_power_of_2, target_of, vendor
from orthorank_kernels.triton.norm_score import bounds, first_piece, norm_and_score
from orthorank_kernels.triton.strides import strides


@triton.jit(do_not_specialize=["n_tokens", "n_seqs", "n_blocks", "tokens_each", "stride_out_seq"])
def rms_norm_score_kernel(
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
    n_tokens,  # of a sequence of the batch, or of all sequences
    n_seqs,
    n_blocks,
    tokens_each,
    eps,
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
):
    eps = tl.cast(eps, tl.float32)
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < HIDDEN
    weight = None if weight_ptr is None else tl.load(weight_ptr + channel, mask=inside, other=0.0)
    bias = None if bias_ptr is None else tl.load(bias_ptr + channel, mask=inside, other=0.0)
    seq, token, end = first_piece(cu_seqlens_ptr, n_tokens, n_seqs, n_blocks, tokens_each)
    # Once in the batch layout; in the packed one, once for each sequence that has tokens here, and each empty one
    # between them.
    while (token < end) & (seq < n_seqs):
        begin, stop = bounds(starts_ptr, cu_seqlens_ptr, seq=seq, end=end, n_tokens=n_tokens)
        if stop > token:
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
            )
            token = stop
        seq += 1


SMALLEST, LARGEST = 2048, 8192  # hidden sizes that kinds of problems are named for
STAGED_BYTES = 16384  # of a token's state, at most, where loads run ahead: so shared memory holds two programs' states
TWO_PROGRAMS = 64  # registers, so that an SM has two programs of 16 warps; the compiler finds a way without spills


def launch_settings(
    batch: int, tokens: int, hidden: int, token_bytes: int, shared_bytes: int, target: str
) -> dict[str, int]:
    """Tokens a program takes, programs for each sequence of the batch, block size and warps.

    More tokens a program save reads of weight and sink, but a GPU has to be filled first, with ``enough_programs``;
    then one part in ``shared_part`` of a program's traffic may be vectors that all of its tokens share. The norm alone
    and the norm with selection share block and warps: the order of a sum, and so its last bit, depends on them.

    Args:
        batch: sequences (1 in the packed layout); tokens: of each (or of all sequences); hidden.
        token_bytes: what a token reads and writes; shared_bytes: what a program reads once.
        target: ``target_of(device)``.
    """
    block = next_power_of_2(hidden)
    chosen = _settings.look_up("rms_norm_score", f"hidden {min(LARGEST, max(SMALLEST, block))}", target)
    most = cdiv(chosen["shared_part"] * shared_bytes, token_bytes)
    tokens_each = max(1, min(most, batch * tokens // chosen["enough_programs"]))
    blocks = {"tokens_each": tokens_each, "n_blocks": cdiv(tokens, tokens_each)}
    return {**blocks, "BLOCK": block, "num_warps": chosen["num_warps"]}


def stages(
    hidden_states: torch.Tensor, residual: torch.Tensor | None, score: str, cu_seqlens: torch.Tensor | None, target: str
) -> int | None:
    """Stages of the loop over tokens, one more than the states that shared memory holds. None: no load runs ahead.

    Where a state is normed, all but one of those are on their way: 48 KB or more for an SM of an H100.
    """
    state = hidden_states.element_size() * hidden_states.shape[-1]
    if hidden_states.element_size() > 2 or state % 16 or state > STAGED_BYTES or score != "inner":
        return None
    if vendor(target) != "nvidia":  # they go to registers
        return 2 if cu_seqlens is None and residual is None else None
    if cu_seqlens is not None and state < STAGED_BYTES // 4:
        return None
    return 4 if family(target) in ("hopper", "blackwell") and residual is None else 3


def norm_arguments(
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    norm: str,
    bias: torch.Tensor | None,
    weight_offset: float,
    score: str,
    sink: torch.Tensor | None,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    *,
    normed: torch.Tensor | None,
    scores: torch.Tensor,
    summed: torch.Tensor | None,
) -> tuple[int, dict[str, Any]]:
    """Number of programs, and the arguments of a kernel that norms and scores, alone or before a selection.

    Args:
        normed, scores, summed: to be written; None: not wanted.
    """
    hidden = hidden_states.shape[-1]
    if cu_seqlens is None:
        batch, tokens = hidden_states.shape[:2]
        steps = strides("seq", "token", x=hidden_states, residual=residual)
    else:
        batch, tokens = 1, hidden_states.shape[0]
        steps = {"stride_x_seq": 0, "stride_residual_seq": 0, **strides("token", x=hidden_states, residual=residual)}
    states = hidden * hidden_states.element_size()
    reads = 1 + (residual is not None)
    writes = (normed is not None) + (summed is not None)
    sink_bytes = reads * states if sink is None else hidden * sink.element_size()
    target = target_of(hidden_states.device)
    settings = launch_settings(
        batch,
        tokens,
        hidden,
        token_bytes=(reads + writes) * states,
        shared_bytes=sink_bytes + ((weight is not None) + (bias is not None)) * states,
        target=target,
    )
    ahead = stages(hidden_states, residual, score, cu_seqlens, target)
    if vendor(target) == "nvidia" and ahead and cu_seqlens is None and norm == "rms" and settings["num_warps"] == 16:
        settings["maxnreg"] = TWO_PROGRAMS
    return batch * settings["n_blocks"], {
        "x_ptr": hidden_states,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "sink_ptr": sink,
        "starts_ptr": starts,
        "cu_seqlens_ptr": cu_seqlens,
        "normed_ptr": normed,
        "scores_ptr": scores,
        "sum_ptr": summed,
        "n_tokens": tokens,
        "n_seqs": batch if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        "eps": eps,
        **steps,
        **strides("seq", sink=None if sink is None or sink.dim() == 1 else sink),
        "stride_out_seq": tokens if cu_seqlens is None else 0,
        "NORM": norm,
        "OFFSET": weight_offset,
        "COSINE": score == "cosine",
        "HIDDEN": hidden,
        "STAGES": ahead,
        "enable_fp_fusion": False,  # see the docstring: sums must not depend on the lane
        **settings,
    }


def rms_norm_score(
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None,
    norm: str,
    bias: torch.Tensor | None,
    weight_offset: float,
    score: str,
    sink: torch.Tensor | None,
    starts: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    write_norm: bool,
    copy_input: bool,
    out: tuple[torch.Tensor | None, ...] | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Launcher of the operator ``rms_norm_score``; arguments are checked in the public function."""
    results = norm_outputs(hidden_states, residual, norm, write_norm, copy_input) if out is None else out
    if results[1].numel() == 0:
        return results
    normed, scores, summed = results
    if sink is not None and sink.dim() == 1 and cu_seqlens is not None:
        # With one sink for all sequences, where they end does not matter.
        hidden_states, cu_seqlens = hidden_states.unsqueeze(0), None
        residual = None if residual is None else residual.unsqueeze(0)
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
    launch(rms_norm_score_kernel, (programs,), hidden_states, **arguments)
    return results
