"""Rows in and out of the residual stream, and what a layer does to rows on the way.

A position of -1 marks a missing entry: gathers give zeros there, scatters skip it.
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from orthorank_kernels.layout import empty_ordered_like
from orthorank_kernels.reference.norms import normalise, rms_norm, wide
from orthorank_kernels.reference.sequences import listed, valid_ranges


def gather_rows(x: Tensor, positions: Tensor) -> Tensor:
    """``out[b, i] = x[b, positions[b, i]]``."""
    out = x.new_zeros(*positions.shape, x.shape[2])
    for b, i in (positions >= 0).nonzero().tolist():
        out[b, i] = x[b, positions[b, i]]
    return out


def scatter_rows_(out: Tensor, positions: Tensor, rows: Tensor) -> None:
    """``out[b, positions[b, i]] = rows[b, i]``."""
    for b, i in (positions >= 0).nonzero().tolist():
        out[b, positions[b, i]] = rows[b, i]


def scatter_add_rows_(out: Tensor, positions: Tensor, rows: Tensor, residual: Tensor, scale: float = 1.0) -> None:
    """``out[b, positions[b, i]] = residual[b, i] + scale * rows[b, i]``, the product rounded before it is added."""
    scatter_rows_(out, positions, residual + (rows if scale == 1.0 else rows * scale))


def gather_add_rms_norm(
    hidden_states: Tensor, positions: Tensor, addend: Tensor, weight: Tensor | None, eps: float, norm: str = "rms",
    bias: Tensor | None = None, weight_offset: float = 0.0, scale: float = 1.0, addend_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``residual[b, i] = hidden_states[b, positions[b, i]] + scale * addend[b, i]``, and its norm."""
    if addend_weight is not None:
        addend = rms_norm(addend, addend_weight, eps, weight_offset)
    missing = (positions < 0)[..., None]
    added = addend if scale == 1.0 else addend * scale
    residual = (gather_rows(hidden_states, positions) + added).masked_fill(missing, 0)
    if norm == "identity":
        return residual, residual.new_empty(0)
    return residual, normalise(residual, weight, eps, norm, bias, weight_offset).masked_fill(missing, 0)


def silu_and_mul(gate: Tensor, up: Tensor, positions: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, each step rounded to the dtype, as in Hugging Face's MLPs."""
    product = silu(gate) * up
    return (product if positions is None else product.masked_fill((positions < 0)[..., None], 0)).contiguous()


def apply_rotary_at(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False,
    rotary_dim: int | None = None,
) -> Tensor:  # fmt: skip
    """``out1 = x1 * cos - x2 * sin``, ``out2 = x2 * cos + x1 * sin``, with the angles of each row's position.

    x1 and x2 are the halves of the first ``rotary_dim`` elements of a head, or its even and its odd ones.
    """
    rotary_dim = cos.shape[-1] if rotary_dim is None else rotary_dim
    half, dtype = rotary_dim // 2, wide(x.dtype)
    halves, pairs = (slice(half), slice(half, rotary_dim)), (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
    one, two = pairs if interleaved else halves
    out = empty_ordered_like(x).copy_(x)  # [batch, heads, rows, head_dim]
    for b in range(x.shape[0]):
        table = b if cos.shape[0] > 1 else 0
        for i, p in enumerate(range(x.shape[2]) if positions is None else positions[b].tolist()):
            if p < 0:
                out[b, :, i] = 0
                continue
            c, s = cos[table, p, :half].to(dtype), sin[table, p, :half].to(dtype)
            x1, x2 = x[b, :, i, one].to(dtype), x[b, :, i, two].to(dtype)
            out[b, :, i, one] = (x1 * c - x2 * s).to(x.dtype)
            out[b, :, i, two] = (x2 * c + x1 * s).to(x.dtype)
    return out


def add_low_rank(
    hidden_states: Tensor, low: Tensor, up: Tensor, bias: Tensor | None = None, starts: Tensor | None = None,
    lengths: Tensor | None = None, sink_positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``hidden_states + up low + bias`` for every valid token but the sink, ``[batch, tokens, hidden]``."""
    dtype = wide(hidden_states.dtype)
    out = hidden_states.clone(memory_format=torch.contiguous_format)
    packed, ranges = cu_seqlens is not None, valid_ranges(hidden_states.shape[:2], starts, lengths, cu_seqlens)
    sinks = listed(sink_positions, len(ranges), 0 if packed else None)
    for number, ((begin, end), sink) in enumerate(zip(ranges, sinks, strict=True)):
        row = 0 if packed else number
        if packed:  # counted from the sequence's first token
            sink = begin + sink if sink >= 0 else -1
        for t in range(begin, end):
            if t != (begin if sink is None else sink):
                added = up.to(dtype) @ low[row, t].to(dtype)
                total = hidden_states[row, t].to(dtype) + (added if bias is None else added + bias.to(dtype))
                out[row, t] = total.to(out.dtype)
    return out
