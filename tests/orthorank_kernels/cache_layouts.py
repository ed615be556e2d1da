"""Paged caches as serving stacks lay them out, as views ``[blocks, block_size, kv_heads, head_dim]``."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tests.orthorank_kernels.attention_cases import Packed, integers
from tests.orthorank_kernels.tools import DEVICE

Views = tuple[torch.Tensor, torch.Tensor]
New = Callable[..., torch.Tensor]


def _joint(kv: torch.Tensor) -> Views:
    """vLLM from 0.26 on: logical ``[blocks, kv_heads, block_size, 2 * head_dim]``."""
    k, v = kv.transpose(1, 2).split(kv.shape[-1] // 2, -1)
    return k, v


# Each takes an allocator and (blocks, block_size, kv_heads, head_dim). A letter is a dimension of memory, outermost
# first: layer, block, head, token (N), channel.
LAYOUTS: dict[str, Callable[[New, int, int, int, int], Views]] = {
    "vllm LBHNC": lambda new, nb, bs, h, d: _joint(new(nb, h, bs, 2 * d)),
    "vllm LBNHC": lambda new, nb, bs, h, d: _joint(new(nb, bs, h, 2 * d).transpose(1, 2)),
    "vllm BLHNC": lambda new, nb, bs, h, d: _joint(new(nb, 3, h, bs, 2 * d)[:, 1]),
    "vllm BLNHC": lambda new, nb, bs, h, d: _joint(new(nb, 3, bs, h, 2 * d)[:, 1].transpose(1, 2)),
    "vllm LHBNC": lambda new, nb, bs, h, d: _joint(new(h, nb, bs, 2 * d).transpose(0, 1)),
    "vllm before 0.26, flash-attn": lambda new, nb, bs, h, d: new(2, nb, bs, h, d).unbind(0),
    "vllm before 0.26, triton": lambda new, nb, bs, h, d: new(nb, 2, bs, h, d).unbind(1),
    "sglang NHD": lambda new, nb, bs, h, d: (
        new(nb * bs, h, d).view(-1, bs, h, d),
        new(nb * bs, h, d).view(-1, bs, h, d),
    ),
    "sglang HND": lambda new, nb, bs, h, d: (new(nb, h, bs, d).transpose(1, 2), new(nb, h, bs, d).transpose(1, 2)),
}


class Paged(NamedTuple):
    """The tensors of the paged op, in its order."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    positions: torch.Tensor
    cu_selected: torch.Tensor
    block_table: torch.Tensor
    seq_lens: torch.Tensor


def paged(case: Packed, block_size: int, layout: str = "vllm LBHNC", dtype: torch.dtype | None = None) -> Paged:
    """Packed keys and values in pages, in random order. Slots without a key hold NaN; table entries without need
    hold page ids that do not exist, so whoever follows them fails."""
    heads, dim = case.k.shape[1:]
    needed = [-(-length // block_size) for length in case.lengths]
    blocks = sum(needed) + 3
    dtype = case.k.dtype if dtype is None else dtype

    def new(*shape: int) -> torch.Tensor:
        return torch.full(shape, float("nan")).to(DEVICE, dtype)

    k_cache, v_cache = LAYOUTS[layout](new, blocks, block_size, heads, dim)
    order = iter(torch.randperm(blocks, generator=torch.Generator().manual_seed(7)).tolist())
    table = torch.full((len(needed), max([*needed, 0]) + 2), 2**31 - 1)
    table[:, 1::2] = -(2**31)
    key = 0
    for s, length in enumerate(case.lengths):
        for page in range(needed[s]):
            table[s, page] = block = next(order)
            tokens = slice(key + page * block_size, key + min((page + 1) * block_size, length))
            for cache, values in ((k_cache, case.k), (v_cache, case.v)):
                bits(cache)[block, : tokens.stop - tokens.start] = bits(values[tokens].to(dtype))
        key += length
    return Paged(case.q, k_cache, v_cache, case.positions, case.cu_selected, integers(table), integers(case.lengths))


def bits(x: torch.Tensor) -> torch.Tensor:
    """A view that torch can index and assign: float8 as bytes."""
    return x.view(torch.uint8) if x.element_size() == 1 else x
