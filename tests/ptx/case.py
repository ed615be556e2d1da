"""A case of the test suite: one call of a public op, and what such calls are made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HALF, FLOAT, HALF16 = torch.bfloat16, torch.float32, torch.float16


@dataclass(frozen=True)
class Case:
    """One call.

    Args:
        writes: the arguments that the op changes, if it returns nothing.
        forced: constants of the attention launcher that are other ones in this call, for what would take gigabytes.
        settings: by op, launch settings that are other ones in this call: what large inputs bring about in small ones.
        environment: variables that are set during this call; targets: GPUs that the case is for, all if empty.
    """

    group: str
    op: str
    name: str
    dtype: torch.dtype
    arguments: Callable[[torch.dtype], dict[str, Any]]
    slow: bool = False
    writes: tuple[str, ...] = ()
    forced: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    targets: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.op}, {self.name}, {str(self.dtype).removeprefix('torch.')}"


def random(*shape: int, dtype: torch.dtype = FLOAT, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def ints(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def some_positions(batch: int, selected: int, tokens: int, missing: int = 1) -> Tensor:
    """Ascending; the last row ends with ``missing`` entries of -1."""
    generator = torch.Generator().manual_seed(selected)
    rows = [torch.randperm(tokens, generator=generator)[:selected].sort().values for _ in range(batch)]
    positions = torch.stack(rows).int()
    positions[-1, selected - missing :] = -1
    return positions
