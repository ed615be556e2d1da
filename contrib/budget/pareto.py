"""The Pareto front of mixed plans: what each cost buys in loss, as JSON and CSV."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Point:
    """One plan that was measured.

    Args:
        cost: of its decoder layers, in the unit of the search. loss: on the calibration windows, nats per token.
        plan: keep ratio of each layer that is not dense. origin: where it comes from; "" for one that was searched.
    """

    cost: float
    loss: float
    plan: Mapping[int, float]
    origin: str = ""

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; inf when it overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def front_of(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats: cost ascending, loss strictly descending.

    Of points with equal cost and loss, the first given one stays.

    >>> [p.loss for p in front_of([Point(2, 1.0, {}), Point(1, 3.0, {}), Point(2, 2.0, {}), Point(3, 1.0, {})])]
    [3.0, 1.0]
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        if not front or point.loss < front[-1].loss:
            front.append(point)
    return front


def best_within(points: Iterable[Point], most: float) -> Point | None:
    """The point of least loss that costs ``most`` or less; of equal ones the cheapest. None: there is none.

    >>> best_within([Point(2, 1.0, {}), Point(1, 3.0, {})], 1.5).loss
    3.0
    """
    affordable = [point for point in points if point.cost <= most]
    return min(affordable, key=lambda p: (p.loss, p.cost), default=None)


def front_as_dict(points: Sequence[Point], dense_cost: float, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What ``pareto.json`` holds: the facts, the front, and all points by cost.

    Args:
        points: all that were measured. dense_cost: what the dense layers cost. facts: what else there is to say.
    """
    front = front_of(points)
    ordered = sorted(points, key=lambda p: (p.cost, p.loss))
    return {
        "format": 1,
        **facts,
        "dense_cost": dense_cost,
        "front": [_row(point, dense_cost) for point in front],
        "points": [_row(point, dense_cost) | {"on_front": point in front} for point in ordered],
    }


def front_as_csv(points: Sequence[Point], dense_cost: float) -> str:
    """All points as CSV, by cost; the last column has the plan as ``layer:ratio`` pairs.

    >>> print(front_as_csv([Point(3.0, 0.5, {2: 0.5, 3: 0.0})], 4.0), end="")
    share,cost,loss,perplexity,on_front,origin,plan
    0.75,3.0,0.5,1.64872,1,search,2:0.5 3:0
    """
    front, out = front_of(points), io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(["share", "cost", "loss", "perplexity", "on_front", "origin", "plan"])
    for point in sorted(points, key=lambda p: (p.cost, p.loss)):
        plan = " ".join(f"{layer}:{ratio:.6g}" for layer, ratio in point.plan.items())
        share = f"{point.cost / dense_cost:.6g}"
        known = (share, point.cost, point.loss, f"{point.perplexity:.6g}")
        rows.writerow([*known, int(point in front), point.origin or "search", plan])
    return out.getvalue()


def _row(point: Point, dense_cost: float) -> dict[str, Any]:
    return {
        "share": point.cost / dense_cost,
        "cost": point.cost,
        "loss": point.loss,
        "perplexity": point.perplexity,
        "origin": point.origin or "search",
        "plan": {str(layer): ratio for layer, ratio in point.plan.items()},
    }
