"""Differences between two measurements of the same things: their mean and how far chance alone may move it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

SIGMAS = 2.0  # a difference counts from twice its standard error on


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean of ``after - before``, one by one, and its standard error: NaN for a single one, or if one is not finite.

    >>> paired([1.0, 2.0], [1.5, 2.1])
    (0.3, 0.2)
    """
    return mean_of([b - a for a, b in zip(before, after, strict=True)])


def mean_of(values: Sequence[float]) -> tuple[float, float]:
    """Mean of ``values`` and its standard error, NaN where there is none.

    >>> mean_of([0.5, 0.1])
    (0.3, 0.2)
    """
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    spread = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return round(statistics.fmean(values), 12), round(spread, 12)


def rise_of(before: Sequence[float], after: Sequence[float]) -> dict[str, Any]:
    """`paired` by name, with ``most``, the mean plus two standard errors: what a rise may be said to be at most.

    >>> rise_of([1.0, 2.0], [1.5, 2.1])
    {'mean': 0.3, 'standard_error': 0.2, 'most': 0.7, 'n': 2}
    """
    mean, error = paired(before, after)
    return {"mean": mean, "standard_error": error, "most": mean + SIGMAS * error, "n": len(before)}


def is_within(rise: Mapping[str, Any], max_loss: float) -> bool:
    """Whether a rise plus two standard errors is at most ``max_loss``; one whose error is not known is not.

    >>> is_within({"most": 0.04}, 0.05), is_within({"most": float("nan")}, 0.05)
    (True, False)
    """
    return bool(rise["most"] <= max_loss)
