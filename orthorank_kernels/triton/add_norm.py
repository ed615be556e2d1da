"""Gather, add and norm: what stands between attention and MLP in a selected layer.

    residual[b, i] = hidden_states[b, positions[b, i]] + scale * addend[b, i];        normed = norm(residual)

hidden_states [batch, tokens, hidden]; positions int32 [batch, selected], -1 = missing; addend, residual, normed [batch,
selected, hidden]; weights and bias [hidden]. The packed layout comes as a batch of one. The grid is (selected / rows,
batch), so a batch is at most 65,535. A row is held in registers, so a hidden size well above 20480 is right but spills.
Computed in float32, so float64 is not supported.

Design. Bytes: two rows in, two rows out, and the vectors once for each program: requested / minimal 1.03 where a
program takes eight rows, which it does when there are enough of them to fill a GPU; with one row each 1.25, from L2.
The norm needs its whole row before it writes, so a row stays in the registers of one program (16 elements a thread and
tensor, 8 warps at hidden 4096), and nothing is read twice. Options are constexprs or absent pointers: what is not
asked for is not in the machine code. Compiled at hidden 4096 in bfloat16, without spills: Llama 39 registers on sm_80
(38 on sm_90), LayerNorm with bias 63 (64), Gemma's sandwich, which reduces twice, 64 (71); 96 % of load bytes and all
store bytes move 128 bits at a time.
"""

import torch
import triton
import triton.language as tl

from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.triton.configs import cdiv, launch, next_power_of_2, target_of
from orthorank_kernels.triton.primitives import add_scaled, norm_row, refuse_float64
from orthorank_kernels.triton.strides import strides


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
    addend_weight_ptr,  # [HIDDEN], or None: the addend is added as it is
    weight_ptr,  # [HIDDEN] or None
    bias_ptr,  # [HIDDEN] or None
    residual_ptr,  # [batch, selected, HIDDEN], contiguous
    normed_ptr,  # [batch, selected, HIDDEN], contiguous, or None if NORM is "identity"
    selected,
    rows_per_program,
    eps,
    scale,
    NORM: tl.constexpr,
    OFFSET: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * rows_per_program
    batch = tl.program_id(1).to(tl.int64)
    positions_ptr += batch * stride_positions_batch
    hidden_ptr += batch * stride_hidden_batch
    addend_ptr += batch * stride_addend_batch
    eps = tl.cast(eps, tl.float32)
    scale = tl.cast(scale, tl.float32)
    columns = tl.arange(0, BLOCK)  # [BLOCK]
    inside = columns < HIDDEN
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    # [BLOCK], read once for all rows
    weight = None if weight_ptr is None else tl.load(weight_ptr + columns, mask=inside, other=0.0)
    bias = None if bias_ptr is None else tl.load(bias_ptr + columns, mask=inside, other=0.0)
    addend_weight = None if addend_weight_ptr is None else tl.load(addend_weight_ptr + columns, mask=inside, other=0.0)

    for entry in range(first, tl.minimum(first + rows_per_program, selected)):
        entry = tl.cast(entry, tl.int64)  # as it is in a compiled kernel; the interpreter counts in Python's ints
        position = tl.load(positions_ptr + entry).to(tl.int64)
        read = columns < tl.where(position >= 0, HIDDEN, 0)  # a missing entry reads nothing: both outputs are zeros
        hidden = tl.load(hidden_ptr + position * stride_hidden_token + columns, mask=read, other=0.0)
        addend = tl.load(addend_ptr + entry * stride_addend_entry + columns, mask=read, other=0.0)
        if addend_weight_ptr is not None:
            addend = norm_row(
                addend.to(tl.float32), addend_weight, None, inside, eps, dtype, NORM="rms", OFFSET=OFFSET, HIDDEN=HIDDEN
            )
        residual = add_scaled(hidden, addend, scale)  # [BLOCK]
        out = (batch * selected + entry) * HIDDEN
        tl.store(residual_ptr + out + columns, residual, mask=inside)
        if NORM != "identity":
            normed = norm_row(residual.to(tl.float32), weight, bias, inside, eps, dtype, NORM, OFFSET, HIDDEN)
            if bias_ptr is not None:
                normed = tl.where(read, normed, 0.0)
            tl.store(normed_ptr + out + columns, normed, mask=inside)


SMALLEST, LARGEST = 512, 8192  # hidden sizes that kinds of problems are named for


def norm_settings(hidden: int, n_rows: int, target: str) -> dict[str, int]:
    """A row in the registers of a program, and how many rows it takes, one after the other.

    One while rows are few (``few_rows``: about what fills a large GPU with one row each); more when they are many, to
    read the weight once for ``rows`` of them.
    """
    block = next_power_of_2(hidden)
    chosen = _settings.look_up("gather_add_rms_norm", f"hidden {min(LARGEST, max(SMALLEST, block))}", target)
    return {
        "rows_per_program": min(chosen["rows"], max(1, n_rows // chosen["few_rows"])),
        "BLOCK": block,
        "num_warps": chosen["num_warps"],
        "num_stages": 1,
    }


def gather_add_rms_norm(
    hidden_states: torch.Tensor,
    positions: torch.Tensor,
    addend: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    norm: str = "rms",
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    scale: float = 1.0,
    addend_weight: torch.Tensor | None = None,
    *,
    out: tuple[torch.Tensor | None, ...] | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    refuse_float64("hidden_states", hidden_states)
    batch, selected, hidden = addend.shape
    residual, normed = out or (hidden_states.new_empty(addend.shape), None)
    if out is None:
        normed = hidden_states.new_empty(addend.shape if norm != "identity" else 0)
    if residual.numel() == 0:
        return residual, normed
    settings = norm_settings(hidden, batch * selected, target_of(hidden_states.device))
    launch(
        gather_add_rms_norm_kernel,
        (cdiv(selected, settings["rows_per_program"]), batch),
        hidden_states,
        hidden_ptr=hidden_states,
        positions_ptr=positions,
        addend_ptr=addend,
        **strides("batch", "token", hidden=hidden_states),
        **strides("batch", positions=positions),
        **strides("batch", "entry", addend=addend),
        addend_weight_ptr=addend_weight,
        weight_ptr=weight,
        bias_ptr=bias,
        residual_ptr=residual,
        normed_ptr=None if norm == "identity" else normed,
        selected=selected,
        eps=eps,
        scale=scale,
        NORM=norm,
        OFFSET=weight_offset,
        HIDDEN=hidden,
        enable_fp_fusion=False,  # sums must not depend on the lane: see `scoring.py`
        **settings,
    )
    return residual, normed
