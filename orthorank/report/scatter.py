"""A scatter chart as SVG text: few points, each with its name beside it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orthorank.report.charts import linear_ticks
from orthorank.report.pictures import line, svg, text

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 252.0, 48.0, 16.0, 28.0, 40.0


@dataclass(frozen=True)
class Point:
    """A named point; ``css`` is its colour class."""

    x: float
    y: float
    name: str
    css: str


def scatter(points: Sequence[Point], width: float, x_name: str, y_name: str) -> str:
    """The points on linear axes.

    Args:
        points: those that are not finite are left out. width: of the picture in pixels.
        x_name, y_name: what the axes show.

    >>> scatter([Point(1.0, 20.0, "dense", "dense"), Point(1.2, 25.0, "plan", "kept")], 300, "x", "y")[:4]
    '<svg'
    """
    shown = [p for p in points if math.isfinite(p.x) and math.isfinite(p.y)]
    if not shown:
        return svg(width, 20, [text(0, 14, "nothing measured", "soft")], f"{y_name} against {x_name}")
    across, up = linear_ticks([p.x for p in shown]), linear_ticks([p.y for p in shown])
    inner, tall = width - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def x_of(value: float) -> float:
        return LEFT + inner * (value - across[0]) / (across[-1] - across[0])

    def y_of(value: float) -> float:
        return TOP + tall * (1 - (value - up[0]) / (up[-1] - up[0]))

    body = []
    for tick in up:
        body.append(line(LEFT, y_of(tick), width - RIGHT, y_of(tick), "grid"))
        body.append(text(LEFT - 6, y_of(tick) + 4, f"{tick:g}", "soft", "end", 11))
    body += [text(x_of(tick), HEIGHT - BOTTOM + 16, f"{tick:g}", "soft", "middle", 11) for tick in across]
    body.append(text(width - RIGHT, HEIGHT - 6, x_name, "soft", "end", 11))
    body.append(text(0, 10, y_name, "soft", "start", 11))
    for p in shown:
        right = x_of(p.x) < width * 0.6  # the name goes where there is room
        body.append(f'<circle class="{p.css}" cx="{x_of(p.x):.1f}" cy="{y_of(p.y):.1f}" r="6"/>')
        body.append(text(x_of(p.x) + (10 if right else -10), y_of(p.y) + 4, p.name, "ink", "start" if right else "end"))
    label = f"{y_name} against {x_name}: " + "; ".join(f"{p.name} {p.y:.4g} at {p.x:.3g}" for p in shown)
    return svg(width, HEIGHT, body, label)
