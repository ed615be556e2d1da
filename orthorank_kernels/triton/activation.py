"""The gate of the MLP.

    out[b, i, :] = silu(gate[b, i, :]) * up[b, i, :],        silu(x) = x / (1 + exp(-x))

gate, up [batch, selected, WIDTH], slices of one merged projection or two tensors; positions int32 [batch, selected] or
None, -1 = zeros that are not computed; out [batch, selected, WIDTH], contiguous. The packed layout comes as a batch of
one. The grid is (selected, batch, column blocks), so a batch is at most 65,535. Computed in float32, so float64 is not
supported.

DESIGN. Bytes: gate and up in, the product out, each once: requested / minimal 1.000, against 5/3 of it in two launches
(silu writes what the product reads again); of what a selected layer moves outside its matrix products this is a third.
Operations: an exponential, a division and two products for 6 bytes in bfloat16, so memory is the bound. A row is cut
into blocks of 4 KiB, so that widths which are no power of two (14336 = 7 x 2048, 11008) leave few threads idle, and a
thread has 64 bytes of each input in flight. Rows are found by strides, so gate and up may be halves of one merged
projection. A thread writes where it read, so that out may be an input.

Compiled at width 14336 in bfloat16 for sm_80 / sm_90 / sm_100 / gfx942: 34 / 38 / 38 / 38 registers, no spills, no
shared memory, all loads and stores of the rows 128 bits wide.

Not taken: whole rows in one program, of which 14336 is padded to 16384, with an eighth of the threads idle; a division
of less precision, since the loads are what is waited for.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import cdiv, launch, next_power_of_2, target_of
from orthorank_kernels.triton.primitives import refuse_float64
from orthorank_kernels.triton.strides import strides


@triton.jit(do_not_specialize=["stride_positions_batch", "selected"])
def silu_and_mul_kernel(
    gate_ptr,  # [batch, selected, WIDTH]
    stride_gate_batch,
    stride_gate_entry,
    up_ptr,  # [batch, selected, WIDTH]
    stride_up_batch,
    stride_up_entry,
    positions_ptr,  # [batch, selected] or None
    stride_positions_batch,
    out_ptr,  # [batch, selected, WIDTH], contiguous
    selected,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = tl.program_id(0).to(tl.int64)
    batch = tl.program_id(1).to(tl.int64)
    first_column = tl.program_id(2).to(tl.int64) * BLOCK
    n_columns = (WIDTH - first_column).to(tl.int32)
    n_read = n_columns
    if positions_ptr is not None:
        n_read = tl.where(tl.load(positions_ptr + batch * stride_positions_batch + entry) >= 0, n_columns, 0)

    columns = tl.arange(0, BLOCK)  # [BLOCK]
    gate_ptr += batch * stride_gate_batch + entry * stride_gate_entry + first_column
    up_ptr += batch * stride_up_batch + entry * stride_up_entry + first_column
    out_ptr += (batch * selected + entry) * WIDTH + first_column
    gate = tl.load(gate_ptr + columns, mask=columns < n_read, other=0.0)  # [BLOCK]
    up = tl.load(up_ptr + columns, mask=columns < n_read, other=0.0)  # [BLOCK]
    x = gate.to(tl.float32)
    activated = (x / (1.0 + tl.exp(-x))).to(gate.dtype)  # [BLOCK]
    product = (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype)  # [BLOCK]
    tl.store(out_ptr + columns, product, mask=columns < n_columns)


def launch_settings(width: int, itemsize: int, target: str) -> dict[str, int]:
    """Bytes of each input that a program reads, and its warps."""
    whole = next_power_of_2(width)
    chosen = _settings.look_up("silu_and_mul", f"rows of {2048 if whole * itemsize <= 2048 else 4096} bytes", target)
    return {"BLOCK": min(whole, chosen["bytes"] // itemsize), "num_warps": chosen["num_warps"], "num_stages": 1}


def silu_and_mul(
    gate: torch.Tensor,
    up: torch.Tensor,
    positions: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor, ...] | None = None,
) -> torch.Tensor:
    refuse_float64("gate", gate)
    batch, selected, width = gate.shape
    target = torch.empty_like(gate, memory_format=torch.contiguous_format) if out is None else out[0]
    if target.numel() == 0:
        return target
    settings = launch_settings(width, gate.element_size(), target_of(gate.device))
    launch(
        silu_and_mul_kernel,
        (selected, batch, cdiv(width, settings["BLOCK"])),
        gate,
        gate_ptr=gate,
        up_ptr=up,
        positions_ptr=positions,
        out_ptr=target,
        **strides("batch", "entry", gate=gate, up=up),
        **strides("batch", positions=positions),
        selected=selected,
        WIDTH=width,
        enable_fp_fusion=True,
        **settings,
    )
    return target
