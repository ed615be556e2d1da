"""Rotary position embedding at given positions, in PyTorch.

    out1 = x1 * cos - x2 * sin;   out2 = x2 * cos + x1 * sin

where x1 and x2 are the two halves of the first ``rotary_dim`` elements of a head, or interleaved its even and its odd
elements; the rest passes through. Computed in float32 and rounded once.
"""

import torch

from orthorank_kernels.layout import empty_ordered_like


def apply_rotary_at(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> torch.Tensor:
    rotary_dim = cos.shape[-1] if rotary_dim is None else rotary_dim
    half = rotary_dim // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    # Where the tables are wider, their second half repeats the first.
    cos = _rows_at(cos[..., :half], positions)[:, None].to(wide)  # [batch or 1, 1, selected, half]
    sin = _rows_at(sin[..., :half], positions)[:, None].to(wide)
    first, second = slice(half), slice(half, rotary_dim)
    if interleaved:
        first, second = slice(0, rotary_dim, 2), slice(1, rotary_dim, 2)
    x1, x2 = x[..., first].to(wide), x[..., second].to(wide)  # [batch, heads, selected, half]

    out = empty_ordered_like(x)
    out[..., first] = torch.addcmul(x1 * cos, x2, sin, value=-1)
    out[..., second] = torch.addcmul(x2 * cos, x1, sin)
    out[..., rotary_dim:] = x[..., rotary_dim:]
    if positions is not None:
        out.masked_fill_((positions < 0)[:, None, :, None], 0)
    return out


def _rows_at(table: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """Rows of ``table`` [batch or 1, tokens, width] at ``positions`` [batch, selected]; any row where that is -1."""
    if positions is None:
        return table
    if table.shape[1] == 0:  # nothing to read, so every position is -1
        return table.new_zeros(*positions.shape, table.shape[2])
    if table.shape[0] == 1:
        return table[0][positions.clamp(min=0)]
    batch = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return table[batch, positions.clamp(min=0)]
