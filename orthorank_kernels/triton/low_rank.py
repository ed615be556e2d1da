"""A low-rank map added to hidden states.

    out[b, t] = hidden_states[b, t] + up low[b, t] + bias        for every valid token but the sink; else hidden_states

hidden_states, out [batch, tokens, HIDDEN]; low [batch, tokens, RANK]; up [HIDDEN, RANK]; bias [HIDDEN] or None. The
packed layout comes as a batch of one with cu_seqlens. The grid is (tiles of tokens, batch, blocks of columns), so a
batch is at most 65,535. Summed in float32, so float64 is not supported.

DESIGN. One launch in place of five (product, sum, mask, where, copy): the result is the copy of the hidden states that
a selected layer writes its tokens into, so nothing is written twice. Bytes: the hidden states in and out, each once;
low and up, RANK / HIDDEN of that, once for every block of columns or tile of tokens, from L2. RANK is walked in blocks
of 128 bytes, so any rank fits, with the sum in registers. A tile writes where it read, so out may be the hidden states.
Which tokens stay as they are is found from what other ops are told of sequences: two bounds and a sink for a row of a
batch; packed, the sinks of all sequences are compared with the tile's tokens, 64 at a time.

Compiled at hidden 4096 and rank 64 in bfloat16 for sm_80 / sm_90 / sm_100 / gfx942: 162 / 164 / 125 / 97 registers,
12 to 32 KiB of shared memory, no spills, all stores of the rows 128 bits wide.

Not taken: the bias as the product's starting sum, into which the compiler turns ``product + bias``: its copies then
stand between a fence of wgmma and the product. The down product in this launch, too: it would save one more where no
merged product carries it, but each program would read all of both matrices, and a few tokens would keep one
multiprocessor busy and all others idle.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import cdiv, launch, next_power_of_2, target_of
from orthorank_kernels.triton.primitives import refuse_float64
from orthorank_kernels.triton.strides import strides

BLOCK_RANK = 128  # bytes of a row of low-rank states, in one product


@triton.jit
def is_sink_of_any(cu_seqlens_ptr, sinks_ptr, token, n_seqs):
    """Which of the tokens ``[BLOCK_M, 1]`` of the packed axis are sinks: bool ``[BLOCK_M]``."""
    found = tl.zeros([token.shape[0]], tl.int32)
    for tile in range(0, n_seqs, 64):
        seq = tile + tl.arange(0, 64)  # [64]
        begin = tl.load(cu_seqlens_ptr + seq, mask=seq < n_seqs, other=0)
        end = tl.load(cu_seqlens_ptr + seq + 1, mask=seq < n_seqs, other=0)
        place = tl.zeros([64], tl.int32)
        if sinks_ptr is not None:
            place = tl.load(sinks_ptr + seq, mask=seq < n_seqs, other=-1)
        sink = tl.where((place >= 0) & (place < end - begin), begin + place, -1)
        found += tl.sum((token == sink[None, :]).to(tl.int32), 1)
    return found > 0


@triton.jit(do_not_specialize=["n_tokens", "n_seqs"])
def add_low_rank_kernel(
    hidden_ptr,  # [batch, tokens, HIDDEN]
    stride_hidden_batch,
    stride_hidden_token,
    low_ptr,  # [batch, tokens, RANK]
    stride_low_batch,
    stride_low_token,
    up_ptr,  # [HIDDEN, RANK]
    stride_up_row,
    bias_ptr,  # [HIDDEN] or None
    starts_ptr,  # [batch] or None
    lengths_ptr,  # [batch] or None
    sinks_ptr,  # [batch] or [n_seqs]; None: the first valid token
    cu_seqlens_ptr,  # [n_seqs + 1], or None: a batch
    out_ptr,  # [batch, tokens, HIDDEN], contiguous
    n_tokens,
    n_seqs,
    HIDDEN: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    batch = tl.program_id(1).to(tl.int64)
    first_column = tl.program_id(2).to(tl.int64) * BLOCK_N
    row = tl.arange(0, BLOCK_M)[:, None].to(tl.int64)  # [BLOCK_M, 1]
    column = tl.arange(0, BLOCK_N)  # [BLOCK_N]
    token = (first + row).to(tl.int32)
    n_rows = (n_tokens - first).to(tl.int32)
    n_columns = (HIDDEN - first_column).to(tl.int32)

    if cu_seqlens_ptr is not None:
        changes = (token < tl.load(cu_seqlens_ptr + n_seqs)) & ~is_sink_of_any(
            cu_seqlens_ptr, sinks_ptr, token, n_seqs
        )[:, None]
    else:
        begin = 0
        end = n_tokens
        if starts_ptr is not None:
            begin = tl.minimum(tl.maximum(tl.load(starts_ptr + batch), 0), n_tokens)
        if lengths_ptr is not None:
            end = begin + tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), n_tokens - begin)
        sink = begin
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + batch)
        changes = (token >= begin) & (token < end) & (token != sink)  # [BLOCK_M, 1]

    low_ptr += batch * stride_low_batch + first * stride_low_token
    up_ptr += first_column * stride_up_row
    wide_column = column[:, None].to(tl.int64)  # [BLOCK_N, 1]
    added = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_rank in range(0, RANK, BLOCK_R):
        rank = first_rank + tl.arange(0, BLOCK_R)[None, :]  # [1, BLOCK_R]
        low = tl.load(
            low_ptr + row * stride_low_token + rank, mask=(row < n_rows) & (rank < RANK), other=0.0
        )  # [BLOCK_M, BLOCK_R]
        up = tl.load(
            up_ptr + wide_column * stride_up_row + rank, mask=(wide_column < n_columns) & (rank < RANK), other=0.0
        )  # [BLOCK_N, BLOCK_R]
        added = tl.dot(low, tl.trans(up), added, input_precision="ieee")

    inside = (row < n_rows) & (column[None, :] < n_columns)  # [BLOCK_M, BLOCK_N]
    hidden_ptr += batch * stride_hidden_batch + first * stride_hidden_token + first_column
    out_ptr += (batch * n_tokens + first) * HIDDEN + first_column
    hidden = tl.load(hidden_ptr + row * stride_hidden_token + column[None, :], mask=inside, other=0.0)
    result = hidden.to(tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first_column + column, mask=column < n_columns, other=0.0)
        result += bias.to(tl.float32)[None, :]
    result = (result + added).to(hidden.dtype)
    tl.store(out_ptr + row * HIDDEN + column[None, :], tl.where(changes, result, hidden), mask=inside)


def launch_settings(hidden: int, rank: int, itemsize: int, target: str) -> dict[str, int]:
    """Tokens and columns of a tile, what it walks of the rank at once, and its warps.

    Rows that begin anywhere move number by number, each with an address of its own: their tiles are half as wide.
    """
    chosen = _settings.look_up("add_low_rank", f"{8 * itemsize}-bit", target)
    return {
        "BLOCK_M": chosen["block_m"],
        "BLOCK_N": chosen["block_n"] if hidden * itemsize % 16 == 0 else max(16, chosen["block_n"] // 2),
        "BLOCK_R": min(BLOCK_RANK // itemsize, max(16, next_power_of_2(rank))),
        "num_warps": chosen["num_warps"],
        "num_stages": 1,
    }


def add_low_rank(
    hidden_states: torch.Tensor,
    low: torch.Tensor,
    up: torch.Tensor,
    bias: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    lengths: torch.Tensor | None = None,
    sink_positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, ...] | None = None,
) -> torch.Tensor:
    refuse_float64("hidden_states", hidden_states)
    batch, tokens, hidden = hidden_states.shape
    target = torch.empty_like(hidden_states, memory_format=torch.contiguous_format) if out is None else out[0]
    if target.numel() == 0:
        return target
    settings = launch_settings(hidden, low.shape[2], hidden_states.element_size(), target_of(hidden_states.device))
    grid = (cdiv(tokens, settings["BLOCK_M"]), batch, cdiv(hidden, settings["BLOCK_N"]))
    launch(
        add_low_rank_kernel,
        grid,
        hidden_states,
        hidden_ptr=hidden_states,
        low_ptr=low,
        up_ptr=up,
        **strides("batch", "token", hidden=hidden_states, low=low),
        **strides("row", up=up),
        bias_ptr=bias,
        starts_ptr=starts,
        lengths_ptr=lengths,
        sinks_ptr=sink_positions,
        cu_seqlens_ptr=cu_seqlens,
        out_ptr=target,
        n_tokens=tokens,
        n_seqs=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        HIDDEN=hidden,
        RANK=low.shape[2],
        enable_fp_fusion=True,
        **settings,
    )
    return target
