"""Steps stated token by token: which tokens select together, and how many of them are updated."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from orthorank import OrthoRankConfig
from orthorank.packed.steps import Step, make_step

CPU = torch.device("cpu")


class Row(NamedTuple):
    """A request in a step: tokens computed before, tokens here, tokens of its prompt."""

    cached: int
    tokens: int
    prompt: int


@dataclass
class Group:
    """Tokens that select together."""

    request: int
    behind: bool
    rows: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    forced: set[int] = field(default_factory=set)  # rows

    @property
    def sink(self) -> int | None:
        """The row of the request's first token, if it is here and part of a prompt."""
        return None if self.behind or self.positions[0] != 0 else self.rows[0]

    def count(self, ratio: float) -> int:
        size = len(self.rows)
        if self.behind:
            return size
        share = math.floor(ratio * size + 1e-6)
        if not self.forced:
            return share
        return min(size - (self.sink is not None), max(share, len(self.forced)))

    def chosen(self, count: int, ranks: Sequence[float]) -> list[int]:
        """The ``count`` smallest: forced ones first, NaN after all numbers, the sink after all."""
        order = sorted(self.rows, key=lambda row: (row == self.sink, row not in self.forced, *_key(ranks[row]), row))
        return sorted(order[:count])

    def below(self, threshold: float, ranks: Sequence[float]) -> list[int]:
        if self.behind:
            return self.rows
        return [row for row in self.rows if row != self.sink and (row in self.forced or ranks[row] < threshold)]


def _key(rank: float) -> tuple[bool, float]:
    return math.isnan(rank), 0.0 if math.isnan(rank) else rank


def groups(rows: Sequence[Row], keep_last: int = 0, window: int | None = None) -> list[Group]:
    """All groups of a step, in the order of their tokens."""
    found: dict[tuple[int, str, int], Group] = {}
    at = 0
    for request, (cached, tokens, prompt) in enumerate(rows):
        for position in range(cached, cached + tokens):
            behind = position >= prompt
            number = 0 if behind or window is None else position // window
            key = request, "behind" if behind else "prompt", number
            group = found.setdefault(key, Group(request, behind))
            group.rows.append(at)
            group.positions.append(position)
            if not behind and position >= prompt - keep_last:
                group.forced.add(at)
            at += 1
    return list(found.values())


def step_of(plan: OrthoRankConfig, rows: Sequence[Row]) -> Step:
    """What `make_step` makes of them."""
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + row.tokens)
    return make_step(plan, starts, [r.cached for r in rows], [r.prompt for r in rows], [0] * len(rows), CPU)


def by_request(chosen: Callable[[Group], list[int]], found: list[Group], requests: int) -> list[list[int]]:
    """The rows that each request updates."""
    rows: list[list[int]] = [[] for _ in range(requests)]
    for group in found:
        rows[group.request] += chosen(group)
    return rows
