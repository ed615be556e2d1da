"""Line charts over the layers of a model, as SVG text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from orthorank.report.pictures import line, svg, text

HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 200.0, 42.0, 12.0, 20.0, 26.0


@dataclass(frozen=True)
class Marks:
    """What is drawn beside the curve.

    Args:
        at: a layer with a vertical line and the words ``words`` above it. last: where the axis ends, so that several
            charts have the same one; None: at the last value.
    """

    at: int | None = None
    words: str = ""
    last: int | None = None


def line_chart(
    values: Sequence[float], width: float, label: str, marks: Marks = Marks(), logarithmic: bool = False
) -> str:
    """A curve over the layers.

    Args:
        values: one per layer, from 0. A value that is not finite (or not positive, on a logarithmic axis) is left out.
        width: of the picture in pixels. label: what it shows, for those who cannot see it.
        marks: what is drawn beside the curve. logarithmic: powers of ten on the vertical axis.
    """
    points = [(i, v) for i, v in enumerate(values) if math.isfinite(v) and (v > 0 or not logarithmic)]
    if not points:
        return svg(width, 20, [text(0, 14, "nothing measured", "soft")], label)
    ticks = log_ticks([v for _, v in points]) if logarithmic else linear_ticks([v for _, v in points])
    low, high = (math.log(t) if logarithmic else t for t in (ticks[0], ticks[-1]))
    inner, last = HEIGHT - TOP - BOTTOM, len(values) - 1 if marks.last is None else marks.last

    def x_of(layer: float) -> float:
        return LEFT + (width - LEFT - RIGHT) * layer / max(1, last)

    def y_of(value: float) -> float:
        return TOP + inner * (1 - ((math.log(value) if logarithmic else value) - low) / (high - low))

    body = []
    for tick in ticks:
        body.append(line(LEFT, y_of(tick), width - RIGHT, y_of(tick), "grid"))
        body.append(text(LEFT - 6, y_of(tick) + 4, f"{tick:g}", "soft", "end", 11))
    numbered = range(0, last + 1, 5 if last <= 50 else 10)
    body += [text(x_of(layer), HEIGHT - 8, str(layer), "soft", "middle", 11) for layer in numbered]
    body.append(text(LEFT - 12, HEIGHT - 8, "layer", "soft", "end", 11))
    if marks.at is not None:
        body.append(line(x_of(marks.at), TOP, x_of(marks.at), HEIGHT - BOTTOM, "mark"))
        body.append(text(x_of(marks.at), TOP - 6, marks.words, "soft", "middle", 11))
    path = " ".join(f"{x_of(i):.1f},{y_of(v):.1f}" for i, v in points)
    return svg(width, HEIGHT, [*body, f'<polyline class="curve" points="{path}"/>'], label)


def log_ticks(values: Sequence[float]) -> list[float]:
    """Powers of ten around the values; a value may be a little below the first.

    >>> log_ticks([0.98, 170.0])
    [1.0, 10.0, 100.0, 1000.0]
    """
    first = math.floor(math.log10(min(values)) + 0.05)
    last = max(math.ceil(math.log10(max(values))), first + 1)
    return [float(f"1e{power}") for power in range(first, last + 1)]


def linear_ticks(values: Sequence[float]) -> list[float]:
    """Round numbers around the values, four to eight of them.

    >>> linear_ticks([-0.1, 0.98])
    [-0.2, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    spread = (max(values) - min(values)) or abs(max(values)) or 1.0
    size = 10.0 ** math.floor(math.log10(spread))
    step = next(size * part for part in (0.1, 0.2, 0.5, 1.0, 2.0) if spread / (size * part) <= 6)
    first, last = math.floor(min(values) / step + 1e-9), math.ceil(max(values) / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
