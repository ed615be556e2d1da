"""How every figure looks: one palette, one style, and SVG that is small, reproducible, and readable in the dark.

matplotlib is imported when a figure is drawn, and without pyplot: no window system is touched, no state is shared.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import write_bytes
from orthorank_kernels.remedies import install

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of figures and of the report's page, by what they stand for. No two of the light ones are the same:
# `dark_rules` finds an element by its colour.
LIGHT = {
    "paper": "#fbfbf9",
    "ink": "#1d2126",
    "soft": "#5d6670",  # captions, axes
    "rule": "#e0e2e0",  # grids, borders
    "dense": "#b9c2cb",  # the dense model, a dense layer
    "kept": "#0f766e",  # OrthoRank, the tokens that a selected layer updates
    "left-out": "#e9ecea",  # the tokens that it leaves out
    "pruned": "#b45309",  # layer pruning, what is worse
}
DARK = {
    "paper": "#14171a",
    "ink": "#e8eaec",
    "soft": "#9aa4ae",
    "rule": "#30363c",
    "dense": "#5b6670",
    "kept": "#2dd4bf",
    "left-out": "#2a2f35",
    "pruned": "#f59e0b",
}
INCH = 96  # CSS pixels
STYLE = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "orthorank",  # the same figure is the same file
    "font.sans-serif": ["DejaVu Sans"],  # it comes with matplotlib; SVG names the generic family after it
    "font.size": 9,  # points: 12 pixels
    "axes.titlesize": 10,
    "axes.titlepad": 16,  # above the words of `mark_sink`
    "axes.labelcolor": LIGHT["soft"],
    "axes.edgecolor": LIGHT["soft"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LIGHT["rule"],
    "legend.frameon": False,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


@contextmanager
def new_figure(width: float, height: float, edge: float = 4) -> Iterator["Figure"]:
    """An empty figure; it is drawn and saved inside the ``with`` block, where the style holds.

    Args:
        width, height: in CSS pixels. edge: what is left free at the left and the right, also in pixels.

    Raises:
        OrthoRankError: matplotlib is not installed.

    >>> with new_figure(100, 50) as figure:
    ...     layer_strip(figure.subplots(), [1.0, 0.25])
    ...     svg(figure, "two layers")[:4]
    '<svg'
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise OrthoRankError(f"drawing figures needs matplotlib; run: {install('plot')}") from error
    with matplotlib.rc_context(STYLE):
        yield Figure((width / INCH, height / INCH), layout=ConstrainedLayoutEngine(w_pad=edge / INCH))


def svg(figure: "Figure", label: str, alone: bool = False) -> str:
    """The figure as an SVG element.

    Args:
        label: what it shows, for those who cannot see it.
        alone: for a file of its own, with a background and its own rules for the dark; otherwise for a page that has
            them.
    """
    out = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(out, format="svg", metadata=nothing, facecolor=LIGHT["paper"] if alone else "none")
    text = out.getvalue().decode("utf-8")
    # matplotlib's rule for every element would hold for the whole page: the element itself hands it down as well.
    head = f'<svg role="img" aria-label="{escape(label)}" stroke-linejoin="round" '
    text = head + text[text.index("<svg ") + 5 :]
    dark = f"<style>@media (prefers-color-scheme: dark) {{ {dark_rules()} }}</style>" if alone else ""
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", dark, text, count=1, flags=re.DOTALL)
    # Groups are numbered the same in every figure of a page; a number with words for its name is what hovering shows.
    text = re.sub(r'<g id="([^"]*)"', lambda group: f"<g><title>{group[1]}</title" if " " in group[1] else "<g", text)
    text = re.sub(r'<g/>| transform="rotate\(-0 [^)]*\)"', "", text)
    text = re.sub(r"(\.\d\d)\d+", r"\1", text)  # hundredths of a point are enough
    return re.sub(r"\s*\n\s*", " ", re.sub(r">\s+<", "><", text)).strip()


def save(figure: "Figure", folder: Path, name: str) -> list[Path]:
    """Write the figure as ``name.png`` and ``name.svg`` into ``folder``, each in one step."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=160, facecolor=LIGHT["paper"])
    contents = {".png": out.getvalue(), ".svg": (svg(figure, name, alone=True) + "\n").encode()}
    paths = [folder / (name + ending) for ending in contents]
    for path in paths:
        write_bytes(path, contents[path.suffix])
    return paths


def dark_rules() -> str:
    """CSS rules that give the elements of figures their colours in the dark.

    A figure has its light colours in itself, so that viewers without style sheets show them.
    """
    return " ".join(
        f'[style*="{what}: {colour}"] {{ {what}: {DARK[name]} !important }}'
        for name, colour in LIGHT.items()
        for what in ("fill", "stroke")
    )


def layer_strip(axes: "Axes", shares: Sequence[float]) -> None:
    """The paper's Figure 5: a column per layer, filled by the share of the tokens that the layer updates.

    A dense layer's column is full, a removed layer's is empty; in SVG, hovering over one says which share it is.
    """
    part = [layer for layer, share in enumerate(shares) if share < 1]
    some = [layer for layer, share in enumerate(shares) if share > 0]
    look: dict[str, Any] = {"width": 0.84, "clip_on": False}
    empty = axes.bar(
        part, [1 - shares[n] for n in part], bottom=[shares[n] for n in part], color=LIGHT["left-out"], **look
    )
    colours = [LIGHT["dense" if shares[n] == 1 else "kept"] for n in some]
    filled = axes.bar(some, [shares[n] for n in some], color=colours, **look)
    for layer, column in [*zip(part, empty, strict=True), *zip(some, filled, strict=True)]:
        column.set_gid(f"layer {layer} updates {shares[layer]:.0%} of the tokens")
    axes.set(xlim=(-0.42, len(shares) - 0.58), ylim=(0, 1), yticks=[])
    axes.spines[:].set_visible(False)


def mark_sink(axes: "Axes", sink_layer: int | None) -> None:
    """A line between the states before and after ``sink_layer``, which forms the sink; None draws nothing."""
    if sink_layer is None:
        return
    axes.axvline(sink_layer + 0.5, color=LIGHT["pruned"], linestyle="--", linewidth=1, clip_on=False)
    top = axes.get_xaxis_transform()
    axes.annotate("the sink forms", (sink_layer + 0.5, 1), (0, 3), top, "offset points", ha="center", fontsize=8)
