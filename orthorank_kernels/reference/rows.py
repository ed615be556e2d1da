"""Rows in and out of the residual stream, and what a layer does to rows on the way.

A position of -1 marks a missing entry: gathers give zeros there, scatters skip it.
"""

from itertools import product
from typing import Any

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
    missing, addend = (positions < 0)[..., None], addend if scale == 1.0 else addend * scale
    residual = (gather_rows(hidden_states, positions) + addend).masked_fill(missing, 0)
    if norm == "identity":
        return residual, residual.new_empty(0)
    return residual, normalise(residual, weight, eps, norm, bias, weight_offset).masked_fill(missing, 0)


def silu_and_mul(gate: Tensor, up: Tensor, positions: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, each step rounded to the dtype, as in Hugging Face's MLPs."""
    product = silu(gate) * up
    return (product if positions is None else product.masked_fill((positions < 0)[..., None], 0)).contiguous()


def apply_rotary_at(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, *how: Any) -> Tensor:
    """Heads ``[batch, heads, rows, head_dim]``, `turned` by the angles of each row's position; how: the two options."""
    out = torch.zeros_like(empty_ordered_like(x))
    for b, i in product(range(x.shape[0]), range(x.shape[2])):
        table, p = b if cos.shape[0] > 1 else 0, i if positions is None else int(positions[b, i])
        if p >= 0:
            out[b, :, i] = turned(x[b, :, i], cos[table, p], sin[table, p], *how)
    return out


def turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, rotary_dim: int | None = None) -> Tensor:
    """``out1 = x1 * cos - x2 * sin``, ``out2 = x2 * cos + x1 * sin``, of heads ``[heads, head_dim]`` of one row.

    x1 and x2 are the halves of the first ``rotary_dim`` elements of a head, or its even and its odd ones.
    """
    end = cos.shape[-1] if rotary_dim is None else rotary_dim
    one, two = (slice(0, end, 2), slice(1, end, 2)) if interleaved else (slice(end // 2), slice(end // 2, end))
    c, s, x1, x2 = (t.to(wide(x.dtype)) for t in (cos[: end // 2], sin[: end // 2], x[:, one], x[:, two]))
    out = x.clone()
    out[:, one], out[:, two] = (x1 * c - x2 * s).to(x.dtype), (x2 * c + x1 * s).to(x.dtype)
    return out


def apply_rotary_and_cache_(
    k_cache: Tensor, v_cache: Tensor, slots: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor,
    positions: Tensor | None = None, *how: Any,
) -> None:  # fmt: skip
    """``k_cache[slot // size, slot % size] = turned(keys[token])``, values as they are, for slots that there are."""
    size = k_cache.shape[1]
    for token, slot in enumerate(slots.tolist()):
        p = token if positions is None else int(positions[token])
        if 0 <= slot < len(k_cache) * size and p >= 0:
            k_cache[slot // size, slot % size] = turned(keys[token], cos[p], sin[p], *how)
            v_cache[slot // size, slot % size] = values[token]


def add_low_rank(
    hidden_states: Tensor, low: Tensor, up: Tensor, bias: Tensor | None = None, starts: Tensor | None = None,
    lengths: Tensor | None = None, sink_positions: Tensor | None = None, cu_seqlens: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``hidden_states + up low + bias`` for every valid token but the sink, ``[batch, tokens, hidden]``."""
    dtype, out = wide(hidden_states.dtype), hidden_states.clone(memory_format=torch.contiguous_format)
    packed, ranges = cu_seqlens is not None, valid_ranges(hidden_states.shape[:2], starts, lengths, cu_seqlens)
    sinks = listed(sink_positions, len(ranges), 0 if packed else None)
    for number, ((begin, end), sink) in enumerate(zip(ranges, sinks, strict=True)):
        row, zero = (0, begin) if packed else (number, 0)  # packed, a sink counts from its sequence's first token
        sink = begin if sink is None else zero + sink if sink >= 0 else -1
        for t in range(begin, end):
            if t != sink:
                added = up.to(dtype) @ low[row, t].to(dtype)
                added = added if bias is None else added + bias.to(dtype)
                out[row, t] = (hidden_states[row, t].to(dtype) + added).to(out.dtype)
    return out
