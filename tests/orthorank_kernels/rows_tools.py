"""Inputs that the tests of the row ops share."""

import torch

from tests.orthorank_kernels.tools import DEVICE

BACKENDS = ("torch", "triton")


def some_positions(batch: int, tokens: int, selected: int, seed: int = 0) -> torch.Tensor:
    """Ascending positions; batch row b has b entries fewer than row 0, so -1 at its end."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((batch, selected), -1, dtype=torch.int32)
    for b in range(batch):
        count = max(0, selected - b)
        positions[b, :count] = torch.randperm(tokens, generator=generator)[:count].sort().values.int()
    return positions.to(DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided_views(batch: int, tokens: int, hidden: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors [batch, tokens, hidden] of every layout that callers have."""
    return {
        "contiguous": random(batch, tokens, hidden, dtype=dtype),
        "slice of a fused projection": random(batch, tokens, 3 * hidden, dtype=dtype)[..., hidden : 2 * hidden],
        "slice of the tokens": random(batch, tokens + 5, hidden, dtype=dtype)[:, 2:-3],
        "tokens first": random(tokens, batch, hidden, dtype=dtype).transpose(0, 1),
        "every second row": random(2 * batch, 2 * tokens, hidden, dtype=dtype)[::2, ::2],
    }


LAYOUTS = tuple(strided_views(1, 1, 1, torch.float32))


def gathered_by_loop(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*positions.shape, x.shape[2], dtype=x.dtype, device=x.device)
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if p >= 0:
                out[b, i] = x[b, p]
    return out
