"""Pictures as SVG text: they follow the page's colours, so one picture serves light and dark."""

from collections.abc import Sequence
from html import escape
from typing import Any

from orthorank.report import words

FONT = 'font-family="system-ui, -apple-system, Segoe UI, Roboto, sans-serif"'


def svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    """An SVG element of ``width`` x ``height`` pixels around ``body``, with a text for those who cannot see it.

    >>> svg(10, 5, [rect(0, 0, 10, 5, "dense")], "a bar")[-61:]
    '<rect class="dense" x="0" y="0" width="10" height="5"/></svg>'
    """
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img" aria-label="{escape(label, quote=True)}" {FONT} font-size="12">'
        + "".join(body)
        + "</svg>"
    )


def text(x: float, y: float, words: str, css: str = "ink", anchor: str = "start", size: float = 12) -> str:
    """One line of text; ``css`` names its colour class."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size:g}"'
    return f'<text class="{css}" {place}>{escape(words)}</text>'


def rect(x: float, y: float, wide: float, tall: float, css: str) -> str:
    """A rectangle; nothing when it has no area."""
    if wide <= 0 or tall <= 0:
        return ""
    place = " ".join(f'{name}="{round(v, 1):g}"' for name, v in (("x", x), ("y", y), ("width", wide), ("height", tall)))
    return f'<rect class="{css}" {place}/>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def layer_stacks(rows: Sequence[dict[str, Any]], num_layers: int, width: float) -> str:
    """The chosen layers as in the paper's Figure 5: a strip per row, in it a column per layer.

    A column's filled part is the share of tokens that the layer updates: all of it in a dense layer, ``keep_ratio`` of
    it in a selected one, nothing in a removed one.

    Args:
        rows: each with "title", "layers", "keep_ratio" and, where layers differ, "keep_ratios".
        num_layers: columns. width: of the picture in pixels.
    """
    step = width / num_layers
    wide, tall = step - min(3.0, step / 4), 44.0
    body, y = [], 0.0
    for row in rows:
        body.append(text(0, y + 12, row["title"]))
        y += 20
        body += [_column(layer, words.ratio_of(row, layer), layer * step, y, wide, tall) for layer in range(num_layers)]
        y += tall + 13
        numbered = row["layers"] if step >= 15 else range(0, num_layers, 5)  # closer, the numbers would overlap
        body += [text(layer * step + wide / 2, y, str(layer), "soft", "middle", 11) for layer in numbered]
        y += 18
    label = "; ".join(f"{row['title']}: layers {', '.join(map(str, row['layers']))}" for row in rows)
    return svg(width, y, body, label)


def _column(layer: int, share: float, x: float, y: float, wide: float, tall: float) -> str:
    filled = tall * share
    title = f"<title>{escape(f'layer {layer} updates {share:.0%} of the tokens')}</title>"
    left_out = rect(x, y, wide, tall - filled, "left-out")
    return f"<g>{title}{left_out}{rect(x, y + tall - filled, wide, filled, 'dense' if share == 1 else 'kept')}</g>"


def bars(entries: Sequence[tuple[str, float | None, str, str]], width: float, label: str) -> str:
    """Horizontal bars, each with its name above it and its figure at its end.

    Args:
        entries: ``(name, value, figure, colour class)``; a value of None draws no bar.
        width: of the picture in pixels. label: what the picture shows, for those who cannot see it.
    """
    largest = max((value for _, value, _, _ in entries if value), default=1.0)
    body, y = [], 0.0
    for name, value, shown, css in entries:
        length = (width - 64) * (value or 0) / largest
        body += [
            text(0, y + 12, name, "soft"),
            rect(0, y + 18, length, 16, css),
            text(length + 6, y + 30.5, shown, size=13),
        ]
        y += 44
    return svg(width, y, body, f"{label}: " + ", ".join(f"{name} {shown}" for name, _, shown, _ in entries))
