"""Rows in and out of the residual stream: gather, gather + add + RMSNorm, scatter.

    gather_rows           y[b, i] = x[b, positions[b, i]]
    gather_add_rms_norm   r[b, i] = hidden_states[b, positions[b, i]] + addend[b, i];  y = RMSNorm(r)
    scatter_rows_         out[b, positions[b, i]] = rows[b, i]

x, hidden_states, out [batch, tokens, hidden]; positions int32 [batch, selected], -1 = missing; the rest [batch,
selected, hidden] or weight [hidden]. One launch each, no atomics: the positions of a batch row differ. The grid is
(selected, batch, ...), so a batch is at most 65,535. gather_add_rms_norm holds a row in registers, so a hidden size
well above 20480 is right but spills; it computes in float32, so float64 is not supported.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.triton.primitives import rms_norm_row

_FEW_ROWS = 1024  # about what fills a large GPU with one row per program
_MAX_ROWS_PER_PROGRAM = 8


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
    tl.store(out_ptr + columns, row, mask=mask)


@triton.jit(do_not_specialize=["stride_positions_batch", "selected", "rows_per_program"])
def gather_add_rms_norm_kernel(
    hidden_ptr,  # [batch, tokens, HIDDEN]
    stride_hidden_batch,
    stride_hidden_token,
    positions_ptr,  # [batch, selected]
    stride_positions_batch,
    addend_ptr,  # [batch, selected, HIDDEN]
    stride_addend_batch,
    stride_addend_entry,
    weight_ptr,  # [HIDDEN]
    residual_ptr,  # [batch, selected, HIDDEN], contiguous
    normed_ptr,  # [batch, selected, HIDDEN], contiguous
    selected,
    rows_per_program,
    eps,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    batch = tl.program_id(1).to(tl.int64)
    positions_ptr += batch * stride_positions_batch
    hidden_ptr += batch * stride_hidden_batch
    addend_ptr += batch * stride_addend_batch
    eps = tl.cast(eps, tl.float32)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < HIDDEN
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)  # [BLOCK], read once for all rows

    for entry in range(first, tl.minimum(first + rows_per_program, selected)):
        position = tl.load(positions_ptr + entry).to(tl.int64)
        read = columns < tl.where(position >= 0, HIDDEN, 0)  # a missing entry reads nothing: both outputs are zeros
        hidden = tl.load(hidden_ptr + position * stride_hidden_token + columns, mask=read, other=0.0)
        addend = tl.load(addend_ptr + entry * stride_addend_entry + columns, mask=read, other=0.0)
        residual = (hidden.to(tl.float32) + addend.to(tl.float32)).to(hidden.dtype)  # [BLOCK]
        out = (batch * selected + entry) * HIDDEN
        tl.store(residual_ptr + out + columns, residual, mask=inside)
        normed = rms_norm_row(residual.to(tl.float32), weight, eps, HIDDEN)  # [BLOCK]
        tl.store(normed_ptr + out + columns, normed, mask=inside)


def copy_settings(hidden: int, itemsize: int) -> dict[str, int]:
    """Launch settings of the gather and the scatter: 8 KiB per program, 64 bytes in flight per thread."""
    block = min(triton.next_power_of_2(hidden), 8192 // itemsize)
    return {"BLOCK": block, "num_warps": max(1, block * itemsize // 2048), "num_stages": 1}


def norm_settings(hidden: int) -> dict[str, int]:
    """Launch settings of gather_add_rms_norm: a row in the registers of a program, 16 elements per thread or more."""
    block = triton.next_power_of_2(hidden)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512)), "num_stages": 1}


def rows_per_program(n_rows: int) -> int:
    """1 while rows are few, to fill the GPU; up to 8 when they are many, to read the weight once for 8 rows."""
    return min(_MAX_ROWS_PER_PROGRAM, max(1, n_rows // _FEW_ROWS))


def gather_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    (batch, selected), hidden = positions.shape, x.shape[2]
    out = x.new_empty(batch, selected, hidden)
    if out.numel() == 0:
        return out
    settings = copy_settings(hidden, x.element_size())
    with torch.cuda.device_of(x):
        gather_rows_kernel[(selected, batch, triton.cdiv(hidden, settings["BLOCK"]))](
            x_ptr=x,
            stride_x_batch=x.stride(0),
            stride_x_token=x.stride(1),
            positions_ptr=positions,
            stride_positions_batch=positions.stride(0),
            out_ptr=out,
            selected=selected,
            HIDDEN=hidden,
            enable_fp_fusion=True,
            **settings,
        )
    return out


def scatter_rows_(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    batch, selected, hidden = rows.shape
    if rows.numel() == 0:
        return
    settings = copy_settings(hidden, out.element_size())
    with torch.cuda.device_of(out):
        scatter_rows_kernel[(selected, batch, triton.cdiv(hidden, settings["BLOCK"]))](
            out_ptr=out,
            stride_out_batch=out.stride(0),
            stride_out_token=out.stride(1),
            positions_ptr=positions,
            stride_positions_batch=positions.stride(0),
            rows_ptr=rows,
            stride_rows_batch=rows.stride(0),
            stride_rows_entry=rows.stride(1),
            HIDDEN=hidden,
            enable_fp_fusion=True,
            **settings,
        )


def gather_add_rms_norm(
    hidden_states: torch.Tensor, positions: torch.Tensor, addend: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, selected, hidden = addend.shape
    if hidden_states.dtype == torch.float64:
        raise TypeError(
            "hidden_states has dtype float64; the Triton kernel takes float32, float16 and bfloat16: "
            'convert it with .float(), or use backend="reference"'
        )
    residual = hidden_states.new_empty(batch, selected, hidden)
    normed = torch.empty_like(residual)
    if residual.numel() == 0:
        return residual, normed
    rows = rows_per_program(batch * selected)
    with torch.cuda.device_of(hidden_states):
        gather_add_rms_norm_kernel[(triton.cdiv(selected, rows), batch)](
            hidden_ptr=hidden_states,
            stride_hidden_batch=hidden_states.stride(0),
            stride_hidden_token=hidden_states.stride(1),
            positions_ptr=positions,
            stride_positions_batch=positions.stride(0),
            addend_ptr=addend,
            stride_addend_batch=addend.stride(0),
            stride_addend_entry=addend.stride(1),
            weight_ptr=weight,
            residual_ptr=residual,
            normed_ptr=normed,
            selected=selected,
            rows_per_program=rows,
            eps=eps,
            HIDDEN=hidden,
            enable_fp_fusion=True,
            **norm_settings(hidden),
        )
    return residual, normed
