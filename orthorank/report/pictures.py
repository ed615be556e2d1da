"""The pictures of the page, each drawn on the axes of a figure."""

import json
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from orthorank.common.plot import LIGHT, layer_strip, mark_sink, new_figure, svg
from orthorank.report import words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"dense": "dense", "layer-pruning": "pruned", "orthorank": "kept"}
COLOURS |= {name + words.CORRECTED: COLOURS[name] for name in ("layer-pruning", "orthorank")}


def picture(draw: Callable[..., None], label: str, width: float, height: float, *arguments: Any, **options: Any) -> str:
    """SVG of what ``draw`` draws.

    Args:
        draw: a function below; it gets the axes, then ``arguments`` and ``options``.
        label: what it shows, for those who cannot see it. width, height: in CSS pixels.
    """
    return _drawn(draw, label, width, height, json.dumps([arguments, options]))


@lru_cache(maxsize=32)  # the demo writes its page after each step, with mostly the same pictures
def _drawn(draw: Callable[..., None], label: str, width: float, height: float, inputs: str) -> str:
    arguments, options = json.loads(inputs)
    with new_figure(width, height, edge=0) as figure:  # flush with the page's text
        draw(figure.subplots(), *arguments, **options)
        return svg(figure, label)


def bars(axes: "Axes", rows: Sequence[dict[str, Any]], key: str) -> None:
    """A horizontal bar for each row, its name above it and its figure ``key`` at its end; None has no bar."""
    values = [row.get(key) or 0.0 for row in rows]
    axes.barh(range(len(rows)), values, 0.36, color=[LIGHT[COLOURS[row["name"]]] for row in rows], clip_on=False)
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        axes.text(0, number - 0.27, words.TITLES[row["name"]], color=LIGHT["soft"], va="bottom")
        shown = words.shown(key, row.get(key))
        axes.annotate(shown, (value, number), (5, 0), textcoords="offset points", va="center", fontsize=10)
    axes.set(xlim=(0, 1.18 * (max(values) or 1.0)), ylim=(len(rows) - 0.75, -0.75))
    axes.axis("off")


def scatter(axes: "Axes", rows: Sequence[dict[str, Any]]) -> None:
    """Perplexity over measured speed-up, each point with its name beside it."""
    found = [row for row in rows if row.get("perplexity") and row.get("speedup")]
    found.sort(key=lambda row: float(row["perplexity"]))
    middle = sum(row["speedup"] for row in found) / max(1, len(found))
    spread = (found[-1]["perplexity"] - found[0]["perplexity"]) or 1.0 if found else 1.0
    free = -math.inf  # names stand above each other where points are close
    for row in found:
        at, right = (row["speedup"], row["perplexity"]), row["speedup"] <= middle  # the name goes where there is room
        marker = "D" if row["name"].endswith(words.CORRECTED) else "o"
        axes.plot(*at, marker, color=LIGHT[COLOURS[row["name"]]], markersize=8, clip_on=False)
        height = max(row["perplexity"], free)
        free = height + 0.07 * spread
        raised = 160 * (height - row["perplexity"]) / spread  # in points; the axes are about 160 high
        beside, side = ((8, raised), "left") if right else ((-8, raised), "right")
        axes.annotate(words.TITLES[row["name"]], at, beside, textcoords="offset points", va="center", ha=side)
    axes.margins(0.08)
    axes.set(xlabel="measured prefill speed-up", ylabel="perplexity")
    axes.grid(axis="y", clip_on=False)


def layers(axes: "Axes", row: dict[str, Any], num_layers: int, numbered: bool) -> None:
    """What a row's plan does to each layer; ``numbered``: its layers have their numbers, otherwise every fifth has."""
    layer_strip(axes, [words.ratio_of(row, layer) for layer in range(num_layers)])
    axes.set_xticks(row["layers"] if numbered else range(0, num_layers, 5))


def curve(axes: "Axes", values: Sequence[float], sink_layer: int | None, last: int, logarithmic: bool = False) -> None:
    """A line over the layers from 0 to ``last``; a value that cannot be shown is left out."""
    points = [(at, value) for at, value in enumerate(values) if math.isfinite(value) and (value > 0 or not logarithmic)]
    if logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.plot(*zip(*points, strict=True) if points else ([], []), color=LIGHT["kept"], linewidth=2, clip_on=False)
    axes.set(xlim=(0, last), xlabel="layer")
    axes.minorticks_off()
    axes.grid(axis="y", clip_on=False)
    mark_sink(axes, sink_layer)
    if not points:
        axes.text(0.5, 0.5, "nothing measured", transform=axes.transAxes, ha="center")
