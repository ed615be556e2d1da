"""Keys rotated and written to a paged cache, with their values, in PyTorch.

    k_cache[slots[t] // size, slots[t] % size] = keys[t], rotated as by `orthorank_kernels.pytorch.rotary`
    v_cache[slots[t] // size, slots[t] % size] = values[t]

A token whose slot is not there, or whose position is -1, is not written. Values are read on the host only where they
lie on a CPU, or where tangents are wanted.
"""

import torch
from torch.autograd import forward_ad

from orthorank_kernels.checks import readable
from orthorank_kernels.pytorch.rotary import apply_rotary_at


def apply_rotary_and_cache_(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
) -> None:
    if k_cache.shape[0] == 0 or slots.shape[0] == 0:
        return
    present = (slots >= 0) & (slots < k_cache.shape[0] * k_cache.shape[1])  # [tokens]
    rows = None
    if positions is not None:
        present &= positions >= 0
        rows = torch.where(present, positions, -1)[None]  # of other tokens it may be past the tables
    heads = keys.transpose(0, 1)[None]  # [1, kv_heads, tokens, head_dim]
    turned = apply_rotary_at(heads, cos[None], sin[None], rows, interleaved, rotary_dim)[0].transpose(0, 1)
    reads = readable(slots, positions, anywhere=forward_ad._current_level >= 0)
    write = _write_present if reads else _write_all
    write(k_cache, slots, present, turned)
    write(v_cache, slots, present, values)


def _write_present(cache: torch.Tensor, slots: torch.Tensor, present: torch.Tensor, rows: torch.Tensor) -> None:
    """``rows`` ``[tokens, kv_heads, head_dim]`` of the tokens that are ``present`` to their slots of ``cache``."""
    slot, size = slots[present], cache.shape[1]
    _ = cache.grad_fn  # has PyTorch see that the other cache was written, of which this one may be the rest
    cache[slot // size, slot % size] = rows[present]


def _write_all(cache: torch.Tensor, slots: torch.Tensor, present: torch.Tensor, rows: torch.Tensor) -> None:
    """The same, where nobody knows how many these are: others repeat the first of them, and if there is none, all write
    back what lies in one slot.
    """
    blocks, size = cache.shape[:2]
    first = present.int().argmax(0, keepdim=True)  # [1], 0 where none is present
    source = torch.where(present, torch.arange(slots.shape[0], device=slots.device), first)  # [tokens]
    slot = slots[source].clamp(0, blocks * size - 1)
    at = slot // size, slot % size
    none, kept = ~present.any(), cache[at[0][:1], at[1][:1]]  # [1, kv_heads, head_dim]: new memory
    # A repeated row must not add to the gradient again; it loses its tangent, which nobody wants here.
    # A slot that keeps its row passes its gradient through token 0.
    repeated = torch.where(none, kept, rows[first]).detach()
    rows = torch.where(present[:, None, None], rows, repeated)
    if torch.is_grad_enabled() and cache.requires_grad:
        rows[:1] = torch.where(none, kept, rows[:1])
    cache[at] = rows
