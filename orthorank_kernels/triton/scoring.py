"""RMSNorm fused with the sink score.

    normed[b, t, :] = weight * x[b, t, :] * rsqrt(mean(x[b, t, :]^2) + eps)       [batch, tokens, hidden]
    scores[b, t]    = |<sink[b, :], normed[b, t, :]>|                             [batch, tokens], float32

x is read once. Each program normalises several rows and holds weight and sink in registers meanwhile. A row lives in
registers as one block, so a hidden size above 16384 is right but spills.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.triton.primitives import rms_norm_row


@triton.jit
def norm_and_score(
    x_ptr,
    weight_ptr,
    sink_ptr,
    starts_ptr,
    normed_ptr,
    scores_ptr,
    row,
    first,
    n_tokens,
    rows,
    eps,
    stride_x_row,
    stride_x_token,
    stride_sink_row,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens ``first`` to ``first + rows`` of one row of the batch; both int64."""
    eps = tl.cast(eps, tl.float32)
    channel = tl.arange(0, BLOCK)  # [BLOCK]
    inside = channel < HIDDEN
    weight = tl.load(weight_ptr + channel, mask=inside, other=0.0)
    x_ptr += row * stride_x_row
    if sink_ptr is None:
        state_ptr = x_ptr
        if starts_ptr is not None:
            start = tl.load(starts_ptr + row).to(tl.int64)
            state_ptr += tl.minimum(tl.maximum(start, 0), n_tokens - 1) * stride_x_token
        state = tl.load(state_ptr + channel, mask=inside, other=0.0)
        sink = rms_norm_row(state.to(tl.float32), weight, eps, HIDDEN)
    else:
        sink = tl.load(sink_ptr + row * stride_sink_row + channel, mask=inside, other=0.0)
    for token in range(first, tl.minimum(first + rows, n_tokens)):
        x = tl.load(x_ptr + token * stride_x_token + channel, mask=inside, other=0.0)
        normed = rms_norm_row(x.to(tl.float32), weight, eps, HIDDEN)
        out = row * n_tokens + token
        tl.store(normed_ptr + out * HIDDEN + channel, normed, mask=inside)
        # A scalar, which one thread stores: rms_norm_select_kernel relies on that.
        tl.store(scores_ptr + out, tl.abs(tl.sum(normed.to(tl.float32) * sink.to(tl.float32), 0)))


@triton.jit(do_not_specialize=["n_tokens", "n_blocks", "rows"])
def rms_norm_score_kernel(
    x_ptr,
    weight_ptr,
    sink_ptr,
    starts_ptr,
    normed_ptr,
    scores_ptr,
    n_tokens,
    n_blocks,
    rows,
    eps,
    stride_x_row,
    stride_x_token,
    stride_sink_row,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    norm_and_score(
        x_ptr,
        weight_ptr,
        sink_ptr,
        starts_ptr,
        normed_ptr,
        scores_ptr,
        row=program // n_blocks,
        first=program % n_blocks * rows,
        n_tokens=n_tokens,
        rows=rows,
        eps=eps,
        stride_x_row=stride_x_row,
        stride_x_token=stride_x_token,
        stride_sink_row=stride_sink_row,
        HIDDEN=HIDDEN,
        BLOCK=BLOCK,
    )


# More rows a program save reads of weight and sink, but a GPU has to be filled first.
ENOUGH_PROGRAMS = 2048


def launch_settings(batch: int, tokens: int, hidden: int) -> dict[str, int]:
    """Rows a program takes, programs for each row of the batch, block size and warps.

    The norm alone and the norm with selection share them: the order of a sum, and so its last bit, depends on them.
    """
    block = triton.next_power_of_2(hidden)
    rows = max(1, min(16, batch * tokens // ENOUGH_PROGRAMS))
    return {
        "rows": rows,
        "n_blocks": triton.cdiv(tokens, rows),
        "BLOCK": block,
        "num_warps": max(4, min(16, block // 512)),
    }


def rms_norm_score(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    sink: torch.Tensor | None,
    starts: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launcher of the operator ``rms_norm_score``; arguments are checked in the public function."""
    batch, tokens, hidden = hidden_states.shape
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    scores = hidden_states.new_empty(batch, tokens, dtype=torch.float32)
    if scores.numel() == 0:
        return normed, scores
    settings = launch_settings(batch, tokens, hidden)
    with torch.cuda.device_of(hidden_states):
        rms_norm_score_kernel[(batch * settings["n_blocks"],)](
            x_ptr=hidden_states,
            weight_ptr=weight,
            sink_ptr=sink,
            starts_ptr=starts,
            normed_ptr=normed,
            scores_ptr=scores,
            n_tokens=tokens,
            eps=eps,
            stride_x_row=hidden_states.stride(0),
            stride_x_token=hidden_states.stride(1),
            stride_sink_row=0 if sink is None else sink.stride(0),
            HIDDEN=hidden,
            enable_fp_fusion=True,
            **settings,
        )
    return normed, scores
