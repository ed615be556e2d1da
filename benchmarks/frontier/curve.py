"""Methods compared at equal FLOPs: each method's loss between two of its plans, window by window."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.paired import compare

Losses = dict[str, list[float]]  # of each text, window by window
SHARES = (0.92, 0.82)
NEAR = 0.025  # of the dense model's FLOPs: how far from a share a method's plan may be for it to be compared there


def at_share(cells: Sequence[Mapping[str, Any]], share: float) -> Losses | None:
    """The losses of a method at ``share`` of the dense model's FLOPs; None where no plan of it is `NEAR` that.

    On a straight line between the losses of its two plans next to it. Losses rise faster and faster as FLOPs fall, so
    the line is a little above what a plan of just these FLOPs would have, and far above it far from both.

    Args:
        cells: plans with their ``flops`` and ``losses``, the dense model among them.
    """
    above = min((c for c in cells if c["flops"] >= share), key=lambda c: c["flops"], default=None)
    below = max((c for c in cells if c["flops"] <= share), key=lambda c: c["flops"], default=None)
    near = any(abs(c["flops"] - share) <= NEAR for c in cells if c["flops"] < 1)
    if above is None or below is None or not near:
        return None
    apart = above["flops"] - below["flops"]
    weight = (above["flops"] - share) / apart if apart else 0.0
    return {
        text: [(1 - weight) * a + weight * b for a, b in zip(values, below["losses"][text], strict=True)]
        for text, values in above["losses"].items()
    }


def compared(cells: Mapping[str, Sequence[Mapping[str, Any]]], share: float) -> list[dict[str, Any]]:
    """A row for each method that comes to ``share``, with its losses against those of removed layers of its kind.

    Args:
        cells: of each method, such as ``"selected,corrected"``, its plans and the dense model.
    """
    found = {name: losses for name, each in cells.items() if (losses := at_share(each, share)) is not None}
    rows = []
    for name, losses in found.items():
        method, _, kind = name.partition(",")
        removed = found.get(f"removed,{kind}" if kind else "removed")
        row: dict[str, Any] = {
            "method": name,
            "perplexity": {text: round(math.exp(statistics.fmean(values)), 3) for text, values in losses.items()},
        }
        if method != "removed" and removed is not None:
            row["against_removed"] = {text: compare(values, removed[text]) for text, values in losses.items()}
        rows.append(row)
    return rows
