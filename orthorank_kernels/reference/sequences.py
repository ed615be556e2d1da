"""Where the sequences of a call are."""

from itertools import pairwise
from typing import Any

from torch import Tensor


def listed(values: Tensor | None, count: int, otherwise: Any) -> list[Any]:
    """The numbers of a tensor, or ``count`` times ``otherwise`` where it is None."""
    return [otherwise] * count if values is None else values.tolist()


def valid_ranges(
    shape: tuple[int, ...], starts: Tensor | None, lengths: Tensor | None, cu_seqlens: Tensor | None
) -> list[tuple[int, int]]:
    """First valid token of each sequence and one past the last; shape: ``[batch, tokens]``, if nothing is packed."""
    if cu_seqlens is not None:
        return list(pairwise(cu_seqlens.tolist()))
    batch, tokens = shape
    begins = [min(max(begin, 0), tokens) for begin in listed(starts, batch, 0)]
    ends = [min(tokens, b + max(n, 0)) for b, n in zip(begins, listed(lengths, batch, tokens), strict=True)]
    return list(zip(begins, ends, strict=True))
