"""The paper's figures of any model, by matplotlib: PNG and SVG, with colours that colour-blind readers tell apart."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.errors import OrthoRankError
from orthorank.files import write_bytes

if TYPE_CHECKING:
    from orthorank.analysis.layerwise import LayerComparison
    from orthorank.analysis.similarity import Similarities

# Okabe and Ito's palette: distinct under the common kinds of colour blindness, and in grey.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
FORMATS = ("png", "svg")


def draw_similarity_with_sink(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figure 2: cosine of the sink with tokens 1 to 10, layer by layer."""

    def draw(axes: Any) -> None:
        axes = axes[0]
        many = len(found.sink_with[0])
        for number in range(many):
            values = [row[number] for row in found.sink_with]
            axes.plot(values, color=BLUE, alpha=0.25 + 0.4 * number / many, linewidth=1)
        axes.plot(found.sink_mean, color=ORANGE, linewidth=2.5, label=f"mean of tokens 1 to {many}")
        _mark(axes, sink_layer)
        axes.set(
            xlabel="layer", ylabel="cosine with the sink token", title="Normalised states: the sink with other tokens"
        )
        axes.legend(frameon=False)

    return _save(draw, folder, "fig2-similarity-with-sink", (7, 4))


def draw_similarity_across_layers(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figures 3 and 6: cosine of a token's state with itself in other layers; of the sink, and of another token."""

    def draw(axes: Any) -> None:
        box = "" if sink_layer is None else " (box: after the sink forms)"
        titles = (f"sink token{box}", f"token {found.other}{box}")
        for panel, matrix, title in zip(axes, (found.sink_across, found.other_across), titles, strict=True):
            shown = panel.imshow(matrix, vmin=-0.1, vmax=1, cmap="viridis", origin="upper")
            if sink_layer is not None:
                begin, size = sink_layer + 0.5, len(matrix) - sink_layer - 1
                for colour, width in (("white", 3.5), ("black", 1.5)):  # one of them is seen on any colour
                    panel.add_patch(_rectangle((begin, begin), size, size, colour, width))
            panel.set(xlabel="layer", ylabel="layer", title=title)
        axes[-1].figure.colorbar(shown, ax=list(axes), label="cosine", shrink=0.8)

    return _save(draw, folder, "fig3-similarity-across-layers", (10, 4.4), panels=2)


def draw_similarity_of_others(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figure 7: cosine of the sink with other tokens, beside that of another token with those after it."""

    def draw(axes: Any) -> None:
        titles = ("sink token with tokens after it", f"token {found.other} with tokens after it")
        for panel, rows, title in zip(axes, (found.sink_with, found.other_with), titles, strict=True):
            for number in range(len(rows[0])):
                panel.plot([row[number] for row in rows], color=BLUE, alpha=0.4, linewidth=1)
            panel.plot([sum(row) / len(row) for row in rows], color=ORANGE, linewidth=2.5, label="their mean")
            panel.legend(frameon=False, loc="lower left")
            panel.set(xlabel="layer", ylabel="cosine", title=title, ylim=(-0.5, 1.1))
            _mark(panel, sink_layer)  # once the axis has its end: the words stand there

    return _save(draw, folder, "fig7-similarity-of-tokens", (10, 4), panels=2)


def draw_layerwise(found: Sequence["LayerComparison"], criteria: tuple[str, str], folder: Path) -> list[Path]:
    """Figure 4: perplexity under the first criterion minus that under the second, each layer alone selecting."""

    def draw(axes: Any) -> None:
        axes = axes[0]
        values = [one.difference for one in found]
        errors = [abs(one.perplexities[0]) * one.standard_error for one in found]
        colours = [BLUE if value < 0 else ORANGE for value in values]
        bars = None if any(error != error for error in errors) else errors
        axes.bar([one.layer for one in found], values, color=colours, yerr=bars, ecolor=GREY, capsize=2)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(
            xlabel="layer that selects",
            ylabel="difference of perplexity",
            title=f"{criteria[0]} minus {criteria[1]}: below 0, {criteria[0]} is better",
        )

    return _save(draw, folder, "fig4-layerwise-selection", (7, 4))


def draw_chosen_layers(plans: dict[str, dict[int, float]], num_layers: int, folder: Path) -> list[Path]:
    """Figure 5: the chosen layers of plans; a column's filled part is the share of tokens that the layer updates.

    Args:
        plans: by title, the ratio of each layer that is not dense.
    """

    def draw(axes: Any) -> None:
        for panel, (title, ratios) in zip(axes, plans.items(), strict=True):
            shares = [ratios.get(layer, 1.0) for layer in range(num_layers)]
            panel.bar(range(num_layers), [1.0] * num_layers, color="#E4E4E4", width=0.85)
            colours = [BLUE if share == 1 else ORANGE for share in shares]
            panel.bar(range(num_layers), shares, color=colours, width=0.85)
            panel.set(title=title, yticks=[], xlim=(-0.6, num_layers - 0.4))
            panel.spines[:].set_visible(False)
        axes[-1].set_xlabel("layer (full: dense; part: share of the tokens updated; empty: removed)")

    height = 1.3 * len(plans) + 0.6
    return _save(draw, folder, "fig5-chosen-layers", (9, height), panels=len(plans), stacked=True)


def _save(
    draw: Callable[[Any], None],
    folder: Path,
    name: str,
    size: tuple[float, float],
    panels: int = 1,
    stacked: bool = False,
) -> list[Path]:
    figure_type, canvas_type, context = _matplotlib()
    with context:
        figure = figure_type(figsize=size, layout="constrained")
        canvas_type(figure)
        grid = (panels, 1) if stacked else (1, panels)
        axes = [figure.add_subplot(*grid, number + 1) for number in range(panels)]
        draw(axes)
        for panel in axes:
            panel.xaxis.get_major_locator().set_params(integer=True)  # layers
        paths = [folder / f"{name}.{kind}" for kind in FORMATS]
        for path in paths:
            drawn = io.BytesIO()
            figure.savefig(
                drawn, dpi=150, format=path.suffix[1:], metadata={"Date": None} if path.suffix == ".svg" else None
            )
            write_bytes(path, drawn.getvalue())
    return paths


def _matplotlib() -> tuple[Any, Any, Any]:
    """Figure and canvas classes and a style, without pyplot: no window system is touched, no state is shared."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OrthoRankError("drawing figures needs matplotlib; run: pip install 'orthorank-kernels[plot]'") from error
    style = {"font.size": 11, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "orthorank"}
    return Figure, FigureCanvasAgg, matplotlib.rc_context(style)


def _mark(axes: Any, sink_layer: int | None) -> None:
    if sink_layer is not None:
        axes.axvline(sink_layer + 0.5, color=GREY, linestyle="--", linewidth=1)
        axes.annotate("sink formed", (sink_layer + 0.7, axes.get_ylim()[1]), color=GREY, va="top", fontsize=9)


def _rectangle(corner: tuple[float, float], width: float, height: float, colour: str, line: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, fill=False, edgecolor=colour, linewidth=line, clip_on=False)
