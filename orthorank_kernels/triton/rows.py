"""Rows in and out of the residual stream: gather, scatter, add + scatter.

    gather_rows           y[b, i] = x[b, positions[b, i]]
    scatter_rows_         out[b, positions[b, i]] = rows[b, i]
    scatter_add_rows_     out[b, positions[b, i]] = residual[b, i] + scale * rows[b, i]

x, out [batch, tokens, hidden]; positions int32 [batch, selected], -1 = missing; the rest [batch, selected, hidden]. The
packed layout comes as a batch of one. One launch each, no atomics: the positions of a batch row differ. The grid is
(selected, batch, column blocks), so a batch is at most 65,535. Sums are float32, so float64 is supported only where
nothing is summed.

Design. Bytes: each selected row is read and written once, and each position once for a block of columns: requested /
minimal 1.000. The index is one for a row: no index tensor as wide as the rows, as torch.gather and scatter have it. A
program moves 8 KiB, each thread 128 bytes of it in eight 16-byte accesses in flight: at hidden 4096 in bfloat16, 97 %
of the load instructions' bytes move 128 bits at a time (the rest is the position) and all of the stores'. With half of
that for a thread (four warps instead of two) it was 94 %, with fewer bytes in flight in one SM. A missing entry lowers
the bound of the row instead of masking each element, which would narrow the loads to 32 bits. Compiled for sm_80 and
sm_90: gather and scatter 40 registers, add and scatter 48, no spills, no shared memory.

Adding in the scatter costs nothing that the scatter does not: it spares the launch of the addition, and writing and
reading its result (2 of 5 passes over the rows).
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import cdiv, launch, next_power_of_2, target_of
from orthorank_kernels.triton.primitives import add_scaled, refuse_float64
from orthorank_kernels.triton.strides import strides


@triton.jit(do_not_specialize=["stride_positions_batch", "selected"])
def gather_rows_kernel(
    x_ptr,  # [batch, tokens, HIDDEN]
    stride_x_batch,
    stride_x_token,
    positions_ptr,  # [batch, selected]
    stride_positions_batch,
    out_ptr,  # [batch, selected, HIDDEN], contiguous
    selected,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    first_column = tl.program_id(2).to(tl.int64) * BLOCK
    position = tl.load(positions_ptr + batch * stride_positions_batch + entry).to(tl.int64)

    columns = tl.arange(0, BLOCK)  # [BLOCK]
    n_columns = (HIDDEN - first_column).to(tl.int32)
    n_read = tl.where(position >= 0, n_columns, 0)  # a bound, not a second mask: loads stay 128 bits wide
    x_ptr += batch * stride_x_batch + position * stride_x_token + first_column
    out_ptr += (batch * selected + entry) * HIDDEN + first_column
    row = tl.load(x_ptr + columns, mask=columns < n_read, other=0.0)  # [BLOCK]
    tl.store(out_ptr + columns, row, mask=columns < n_columns)


@triton.jit(do_not_specialize=["stride_positions_batch"])
def scatter_rows_kernel(
    out_ptr,  # [batch, tokens, HIDDEN]
    stride_out_batch,
    stride_out_token,
    positions_ptr,  # [batch, selected]
    stride_positions_batch,
    rows_ptr,  # [batch, selected, HIDDEN]
    stride_rows_batch,
    stride_rows_entry,
    residual_ptr,  # [batch, selected, HIDDEN], or None: rows are written as they are
    stride_residual_batch,
    stride_residual_entry,
    scale,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    first_column = tl.program_id(2).to(tl.int64) * BLOCK
    position = tl.load(positions_ptr + batch * stride_positions_batch + entry).to(tl.int64)

    columns = tl.arange(0, BLOCK)  # [BLOCK]
    n_columns = tl.where(position >= 0, (HIDDEN - first_column).to(tl.int32), 0)
    mask = columns < n_columns
    rows_ptr += batch * stride_rows_batch + entry * stride_rows_entry + first_column
    out_ptr += batch * stride_out_batch + position * stride_out_token + first_column
    row = tl.load(rows_ptr + columns, mask=mask)  # [BLOCK]
    if residual_ptr is not None:
        residual_ptr += batch * stride_residual_batch + entry * stride_residual_entry + first_column
        residual = tl.load(residual_ptr + columns, mask=mask)  # [BLOCK]
        row = add_scaled(residual, row, tl.cast(scale, tl.float32))
    tl.store(out_ptr + columns, row, mask=mask)


def copy_settings(op: str, hidden: int, itemsize: int, target: str) -> dict[str, int]:
    """Launch settings of the gather and the scatters: bytes of a row that a program moves, and its warps."""
    width = next_power_of_2(hidden)
    chosen = _settings.look_up(op, f"rows of {4096 if width * itemsize <= 4096 else 8192} bytes", target)
    block = min(width, chosen["bytes"] // itemsize)
    return {"BLOCK": block, "num_warps": chosen["num_warps"], "num_stages": 1}


def gather_rows(
    x: torch.Tensor, positions: torch.Tensor, *, out: tuple[torch.Tensor, ...] | None = None
) -> torch.Tensor:
    (batch, selected), hidden = positions.shape, x.shape[2]
    target = x.new_empty(batch, selected, hidden) if out is None else out[0]
    if target.numel() == 0:
        return target
    settings = copy_settings("gather_rows", hidden, x.element_size(), target_of(x.device))
    launch(
        gather_rows_kernel,
        (selected, batch, cdiv(hidden, settings["BLOCK"])),
        x,
        x_ptr=x,
        positions_ptr=positions,
        out_ptr=target,
        **strides("batch", "token", x=x),
        **strides("batch", positions=positions),
        selected=selected,
        HIDDEN=hidden,
        enable_fp_fusion=True,
        **settings,
    )
    return target


def scatter_rows_(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    _scatter(out, positions, rows, None, 1.0)


def scatter_add_rows_(
    out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, residual: torch.Tensor, scale: float = 1.0
) -> None:
    refuse_float64("out", out)
    _scatter(out, positions, rows, residual, scale)


def _scatter(
    out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, residual: torch.Tensor | None, scale: float
) -> None:
    batch, selected, hidden = rows.shape
    if rows.numel() == 0:
        return
    settings = copy_settings("scatter_rows_", hidden, out.element_size(), target_of(out.device))
    launch(
        scatter_rows_kernel,
        (selected, batch, cdiv(hidden, settings["BLOCK"])),
        out,
        out_ptr=out,
        positions_ptr=positions,
        rows_ptr=rows,
        residual_ptr=residual,
        **strides("batch", "token", out=out),
        **strides("batch", positions=positions),
        **strides("batch", "entry", rows=rows, residual=residual),
        scale=scale,
        HIDDEN=hidden,
        enable_fp_fusion=True,
        **settings,
    )
