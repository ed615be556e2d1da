"""Keys split over programs: how many splits, where they leave their results, and the kernel that joins these.

    out = sum_s 2^(peak_s - peak) acc_s / total,   total = sum_s 2^(peak_s - peak) total_s,   peak = max_s peak_s

Splits are joined in order, so the result is the same, bit by bit, from run to run.

DESIGN. Bytes: (head_dim + 2) * 4 read for each split, query and head, which the attention kernel wrote before, and a
row of the output; requested / minimal 1.000. Few queries over many keys are bound by the reading of keys and values:
for 4 queries of a group this adds less than 1 % of what a split of 1000 keys reads. Operations: one product and one
addition for each number read. Eight rows for a program of four warps, 16 bytes a thread at head_dim 128, so that 4
queries of 32 heads make 16 programs: the launch is short, and what counts is that a split's loads are 128 bits wide.

    registers, no spills, no shared memory      sm_80   sm_90   sm_100   gfx942
    head_dim 64                                    32      32       30       64
    head_dim 128                                   40      34       32       46
    head_dim 256                                   48      48       48       60

At head_dim 128 the loads of sums and the stores are 128 bits wide (73 % of load bytes; the others are a number for each
row); at 64 a thread has 8 bytes of the output.

Not taken: joining by the split that ends last, as the selection does. It would save the launch, with an atomic on a
counter that has to be kept at zero, and one program would wait for memory while the others are done.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import cdiv, launch, next_power_of_2, scratch, target_of
from orthorank_kernels.triton.strides import strides

NOTHING = tl.constexpr(float("-inf"))
LN_2 = tl.constexpr(0.6931471805599453)


class Workspace(NamedTuple):
    """What splits leave, float32: sums of values, not yet divided, ``[splits, batch, selected, heads, head_dim]``;
    largest scores in bits and sums of weights, ``[splits, batch, selected, heads]`` each."""

    sums: torch.Tensor
    peaks: torch.Tensor
    totals: torch.Tensor


def workspace(splits: int, batch: int, selected: int, heads: int, head_dim: int, on: torch.Tensor) -> Workspace:
    shape = (splits, batch, selected, heads)
    sums = scratch(on, (*shape, head_dim), torch.float32)
    # Each on its own, so that all are aligned alike: else alignment, and so compilation, would depend on lengths.
    peaks, totals = (scratch(on, shape, torch.float32) for _ in range(2))
    return Workspace(sums, peaks, totals)


@triton.jit(do_not_specialize=["splits", "rows", "selected", "stride_lse_batch", "stride_lse_head", "stride_lse_token"])
def combine_kernel(
    sums_ptr,  # [splits, rows, head_dim], a row for each of batch, query and head
    peaks_ptr,  # [splits, rows]
    totals_ptr,
    out_ptr,
    lse_ptr,  # or None
    splits,
    rows,
    selected,
    stride_out_batch,
    stride_out_head,
    stride_out_token,
    stride_lse_batch,
    stride_lse_head,
    stride_lse_token,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One program: BLOCK_ROWS rows, grid (row blocks)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows = row < rows
    mask = in_rows[:, None] & (offs_d < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    peak = tl.full([BLOCK_ROWS], NOTHING, tl.float32)
    at = row  # of this split: [BLOCK_ROWS]
    for _ in range(splits):
        split_peak = tl.load(peaks_ptr + at, mask=in_rows, other=NOTHING)
        split_total = tl.load(totals_ptr + at, mask=in_rows, other=0.0)
        split_sums = tl.load(sums_ptr + at[:, None] * HEAD_DIM + offs_d[None, :], mask=mask, other=0.0)
        new_peak = tl.maximum(peak, split_peak)
        finite = tl.where(new_peak == NOTHING, 0.0, new_peak)  # -inf minus -inf is NaN
        shrink = tl.math.exp2(peak - finite)
        weight = tl.math.exp2(split_peak - finite)
        total = total * shrink + split_total * weight
        acc = acc * shrink[:, None] + split_sums * weight[:, None]
        peak = new_peak
        at += rows
    some = total != 0  # NaN among them: a fault must be seen
    out = tl.where(some[:, None], acc / tl.where(some, total, 1.0)[:, None], 0.0)

    token = row // HEADS
    head = row % HEADS
    batch = token // selected
    token = token % selected
    out_rows = batch * stride_out_batch + head * stride_out_head + token * stride_out_token
    tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if lse_ptr is not None:
        lse_rows = batch * stride_lse_batch + head * stride_lse_head + token * stride_lse_token
        lse = tl.where(some, (peak + tl.math.log2(tl.where(some, total, 1.0))) * LN_2, NOTHING)
        tl.store(lse_ptr + lse_rows, lse, mask=in_rows)


def combine(parts: Workspace, out: torch.Tensor, lse: torch.Tensor | None) -> None:
    """Join ``parts`` into ``out`` [batch, heads, selected, head_dim] and ``lse`` [batch, heads, selected]."""
    splits, batch, selected, heads, head_dim = parts.sums.shape
    rows = batch * selected * heads
    kind = f"head_dim {max(64, next_power_of_2(head_dim))}"
    settings = _settings.look_up("combine_splits", kind, target_of(out.device))
    launch(
        combine_kernel,
        (cdiv(rows, settings["rows"]),),
        out,
        sums_ptr=parts.sums,
        peaks_ptr=parts.peaks,
        totals_ptr=parts.totals,
        out_ptr=out,
        lse_ptr=lse,
        splits=splits,
        rows=rows,
        selected=selected,
        **strides("batch", "head", "token", out=out, lse=lse),
        HEADS=heads,
        HEAD_DIM=head_dim,
        BLOCK_D=next_power_of_2(head_dim),
        BLOCK_ROWS=settings["rows"],
        num_warps=settings["num_warps"],
        enable_fp_fusion=True,
    )
