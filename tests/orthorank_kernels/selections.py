"""What the tests of the selection share: the documented order word by word, in Python."""

import math
import random as python_random

import torch

from orthorank_kernels.ops.selection import Selection
from tests.orthorank_kernels.tools import DEVICE

BACKENDS = ("torch", "triton")
NAN, INF = math.nan, math.inf


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def float32(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def by_sort(
    row: list[float], k: int, start: int = 0, length: int | None = None, sink: int | None = None, last: int = 0
) -> list[int]:
    """Positions of the k smallest."""
    end = len(row) if length is None else min(len(row), start + length)
    sink = start if sink is None else sink

    def turn(i: int) -> tuple:
        if i == sink:
            return (3, 0, i)
        if i >= end - last:
            return (0, end - i, i)
        return (2, 0, i) if math.isnan(row[i]) else (1, row[i], i)

    return sorted(sorted(range(start, end), key=turn)[:k])


def by_filter(
    row: list[float],
    threshold: float,
    start: int = 0,
    length: int | None = None,
    sink: int | None = None,
    last: int = 0,
) -> list[int]:
    """Positions of all that score less than a threshold."""
    end = len(row) if length is None else min(len(row), start + length)
    sink = start if sink is None else sink
    return [i for i in range(start, end) if i != sink and (row[i] < threshold or i >= end - last)]


def split(row: list[float], lengths: list[int]) -> list[list[float]]:
    """A packed row as its sequences."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    return [row[end - n : end] for end, n in zip(ends, lengths, strict=True)]


def bounds(lengths: list[int]) -> torch.Tensor:
    """cu_seqlens."""
    return int32(*(sum(lengths[:i]) for i in range(len(lengths) + 1)))


def assert_selects(actual: Selection, expected: list[list[int]], width: int) -> None:
    """``actual`` is the selection of a batch, whose rows are ``expected``."""
    positions, counts, rows, cu_selected = actual
    assert rows is None
    assert cu_selected is None
    assert positions.dtype == counts.dtype == torch.int32
    assert counts.tolist() == [len(row) for row in expected]
    assert positions.tolist() == [row + [-1] * (width - len(row)) for row in expected]


def assert_selects_packed(
    actual: Selection, expected: list[list[int]], lengths: list[int], width: int, offsets: list[int] | None = None
) -> None:
    """``actual`` is a packed selection: of each sequence, the ``expected`` positions, counted from its beginning."""
    begins, offsets = bounds(lengths).tolist(), offsets or [0] * len(lengths)
    rows = [begin + i for begin, picked in zip(begins, expected, strict=False) for i in picked]
    positions = [offset + i for offset, picked in zip(offsets, expected, strict=True) for i in picked]
    assert all(t is not None and t.dtype == torch.int32 for t in actual)
    assert actual.counts.tolist() == [len(picked) for picked in expected]
    assert actual.cu_selected.tolist() == bounds([len(picked) for picked in expected]).tolist()
    assert actual.rows.tolist() == rows + [-1] * (width - len(rows))
    assert actual.positions.tolist() == positions + [-1] * (width - len(rows))


def shuffled(n: int, seed: int) -> list[int]:
    return python_random.Random(seed).sample(range(n), n)
