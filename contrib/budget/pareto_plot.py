"""The Pareto front as a picture: PNG and SVG, in colours that colour-blind readers tell apart, and shapes besides."""

import io
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from contrib.budget.pareto import Point, front_of
from orthorank.common.files import write_bytes
from orthorank_kernels.remedies import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MISSING = f"no picture of the front: matplotlib is not installed; run: {install('plot')}"

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, PURPLE, VERMILION = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00"
GREY, INK = "#B5B5B5", "#333333"
GIVEN = ((VERMILION, "s"), (GREEN, "^"), (PURPLE, "D"), (ORANGE, "v"), (INK, "P"))
UNITS = {"flops": "FLOPs of the decoder layers", "time": "time of the decoder layers"}


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def draw_front(
    points: Sequence[Point],
    dense_cost: float,
    folder: Path,
    *,
    title: str,
    unit: str = "flops",
    budget: float | None = None,
    chosen: Point | None = None,
) -> list[Path]:
    """Write ``pareto.png`` and ``pareto.svg`` into ``folder``, each in one step.

    Args:
        points: all plans that were measured; those with an ``origin`` have a mark of their own.
        dense_cost: cost of the dense layers. title: above the picture. unit: ``"flops"`` or ``"time"``.
        budget: share of the dense cost, drawn as a line. chosen: the plan that the search settled on.

    Returns:
        The files.

    Raises:
        OrthoRankError: a file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    files = []
    # Text stays text in the SVG, and the same data gives the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "orthorank", "font.size": 10}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.set_title(title, loc="left", color=INK, fontsize=11)
        _draw(axes, points, dense_cost, budget, chosen)
        axes.set_xlabel(f"{UNITS[unit]}, share of the dense model's")
        axes.set_ylabel("perplexity on the calibration windows")
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            out = io.BytesIO()
            figure.savefig(out, format=ending, dpi=160, metadata=metadata)
            files.append(folder / f"pareto.{ending}")
            write_bytes(files[-1], out.getvalue())
    return files


def _draw(axes: "Axes", points: Sequence[Point], dense_cost: float, budget: float | None, chosen: Point | None) -> None:
    front = front_of(points)
    x, y = _coordinates(points, dense_cost)
    axes.scatter(x, y, s=12, color=GREY, linewidths=0, label="measured plans", zorder=1)
    x, y = _coordinates(front, dense_cost)
    axes.plot(x, y, color=BLUE, drawstyle="steps-post", linewidth=1.8, zorder=2)
    axes.plot(x, y, "o", color=BLUE, markersize=4, label="front", zorder=3)
    named = [point for point in points if point.origin and point.plan]
    for number, point in enumerate(named):
        colour, shape = GIVEN[number % len(GIVEN)]
        _mark(axes, point, dense_cost, point.origin, color=colour, marker=shape, markersize=9)
    if chosen is not None:
        _mark(axes, chosen, dense_cost, "chosen", color=ORANGE, marker="*", markersize=15)
    if budget is not None:
        axes.axvline(budget, color=INK, linestyle="--", linewidth=1, label=f"budget {budget:g}", zorder=1)
    _limit(axes, [*front, *named], dense_cost)
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="upper right")


def _mark(axes: "Axes", point: Point, dense_cost: float, name: str, **look: Any) -> None:
    share = point.cost / dense_cost
    words = f"{name}: {share:.3f}, {point.perplexity:.2f}"
    axes.plot([share], [point.perplexity], linestyle="", markeredgecolor=INK, zorder=4, label=words, **look)


def _limit(axes: "Axes", shown: Sequence[Point], dense_cost: float) -> None:
    """Show the front and the given plans; what is far worse than they are lies outside."""
    x, y = _coordinates(shown, dense_cost)
    if not x:
        return
    low, high = min(y), max(y)
    if high > 5 * low:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.25, high * 1.25)
    else:
        margin = 0.06 * (high - low) or 0.05 * high
        axes.set_ylim(low - margin, high + 3 * margin)
    wide = 0.04 * (max(x) - min(x)) or 0.05
    axes.set_xlim(min(x) - wide, max(x) + wide)


def _coordinates(points: Sequence[Point], dense_cost: float) -> tuple[list[float], list[float]]:
    finite = [point for point in points if math.isfinite(point.perplexity)]
    return [point.cost / dense_cost for point in finite], [point.perplexity for point in finite]
