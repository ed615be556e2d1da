"""Rows in and out of the residual stream, in PyTorch.

    gather_rows           y[b, i] = x[b, positions[b, i]]
    scatter_rows_         out[b, positions[b, i]] = rows[b, i]
    scatter_add_rows_     out[b, positions[b, i]] = residual[b, i] + scale * rows[b, i]

A position of -1 marks a missing entry: gathers give zeros there, scatters skip it. Values are read on the host only
where they lie on a CPU, or where tangents are wanted: the functions also run inside a captured graph on a GPU. The
packed layout is a batch of one.
"""

import torch
from torch.autograd import forward_ad

from orthorank_kernels.checks import readable


def batch_index(positions: torch.Tensor) -> torch.Tensor:
    """The row of the batch as an index that broadcasts against ``positions``: [batch, 1]."""
    return torch.arange(positions.shape[0], device=positions.device)[:, None]


def gather_rows(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return take(x, positions).masked_fill_((positions < 0)[..., None], 0)


def scaled(rows: torch.Tensor, scale: float) -> torch.Tensor:
    """The product, rounded to the dtype before anything is added, as models with a residual multiplier do it."""
    return rows if scale == 1.0 else rows * scale


def take(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of ``x`` at ``positions``, and some row where that is -1: new memory, [batch, selected, hidden]."""
    if x.shape[1] == 0:  # nothing to read, so every position is -1
        return x.new_zeros(*positions.shape, x.shape[2])
    return x[batch_index(positions), positions.clamp(min=0)]


def scatter_rows_(out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor) -> None:
    tokens, selected = out.shape[1], positions.shape[1]
    if tokens == 0 or selected == 0:
        return
    if readable(positions, anywhere=forward_ad._current_level >= 0):
        where = (positions >= 0).nonzero(as_tuple=True)
        out[where[0], positions[where]] = rows[where]
        return
    # How many entries are missing is not known on the host, so they are written too, where it changes nothing: a
    # missing entry repeats the first present entry of its batch row, and an empty batch row writes back its token 0.
    batch, entries = batch_index(positions), torch.arange(selected, device=positions.device)
    present = positions >= 0
    first = present.int().argmax(-1, keepdim=True)  # [batch, 1], 0 in an empty row
    source = torch.where(present, entries, first)  # [batch, selected]
    target = positions[batch, source].clamp(min=0)

    empty_row = ~present.any(-1)[:, None, None]
    token_0 = out[:, :1].clone()  # [batch, 1, hidden]
    repeated = torch.where(empty_row, token_0, rows[batch, first])
    # A repeated value must not add to the gradient again; it loses its tangent, which nobody wants here.
    # Token 0 of an empty row passes its gradient through entry 0.
    values = torch.where(present[..., None], rows, repeated.detach())
    if torch.is_grad_enabled() and out.requires_grad:
        values[:, :1] = torch.where(empty_row, token_0, values[:, :1])
    out[batch, target] = values


def scatter_add_rows_(
    out: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, residual: torch.Tensor, scale: float = 1.0
) -> None:
    scatter_rows_(out, positions, residual + scaled(rows, scale))
