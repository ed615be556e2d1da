"""The paper's figures of any model, as PNG and SVG."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from orthorank.common.plot import LIGHT, layer_strip, mark_sink, new_figure, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from orthorank.analysis.layerwise import LayerComparison
    from orthorank.analysis.similarity import Similarities


def draw_similarities(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figures 2, 3, 6 and 7."""
    draws = draw_similarity_with_sink, draw_similarity_across_layers, draw_similarity_of_others
    return [path for draw in draws for path in draw(found, sink_layer, folder)]


def draw_similarity_with_sink(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figure 2: cosine of the sink with tokens 1 to 10, layer by layer."""
    with new_figure(670, 380) as figure:
        axes = figure.subplots()
        _cosines(axes, found.sink_with, f"mean of tokens 1 to {len(found.sink_with[0])}", sink_layer)
        axes.set(ylabel="cosine with the sink token", title="Normalised states: the sink with other tokens")
        axes.legend()
        return save(figure, folder, "fig2-similarity-with-sink")


def draw_similarity_across_layers(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figures 3 and 6: cosine of a token's state with itself in other layers; of the sink, and of another token."""
    box = "" if sink_layer is None else " (box: after the sink forms)"
    titles = (f"sink token{box}", f"token {found.other}{box}")
    with new_figure(860, 400) as figure:
        panels = figure.subplots(1, 2)
        for axes, matrix, title in zip(panels, (found.sink_across, found.other_across), titles, strict=True):
            shown = axes.imshow(matrix, vmin=-0.1, vmax=1, cmap="viridis", origin="upper")
            if sink_layer is not None:
                first, last = sink_layer + 0.5, len(matrix) - 0.5
                corners = ([first, last, last, first, first], [first, first, last, last, first])
                for colour, width in (("white", 3.5), ("black", 1.5)):  # one of them is seen on any colour
                    axes.plot(*corners, color=colour, linewidth=width, clip_on=False)
            axes.set(xlabel="layer", ylabel="layer", title=title)
        figure.colorbar(shown, ax=list(panels), label="cosine", shrink=0.8)
        return save(figure, folder, "fig3-similarity-across-layers")


def draw_similarity_of_others(found: "Similarities", sink_layer: int | None, folder: Path) -> list[Path]:
    """Figure 7: cosine of the sink with other tokens, beside that of another token with those after it."""
    titles = ("sink token with tokens after it", f"token {found.other} with tokens after it")
    with new_figure(860, 360) as figure:
        for axes, rows, title in zip(figure.subplots(1, 2), (found.sink_with, found.other_with), titles, strict=True):
            _cosines(axes, rows, "their mean", sink_layer)
            axes.set(ylabel="cosine", title=title, ylim=(-0.5, 1.1))
            axes.legend(loc="lower left")
        return save(figure, folder, "fig7-similarity-of-tokens")


def draw_layerwise(found: Sequence["LayerComparison"], criteria: tuple[str, str], folder: Path) -> list[Path]:
    """Figure 4: perplexity under the first criterion minus that under the second, each layer alone selecting."""
    values = [one.difference for one in found]
    errors = [abs(one.perplexities[0]) * one.standard_error for one in found]
    colours = [LIGHT["kept" if value < 0 else "pruned"] for value in values]
    with new_figure(670, 380) as figure:
        axes = figure.subplots()
        bars = None if any(error != error for error in errors) else errors
        axes.bar([one.layer for one in found], values, color=colours, yerr=bars, ecolor=LIGHT["soft"], capsize=2)
        axes.axhline(0, color=LIGHT["ink"], linewidth=0.8)
        title = f"{criteria[0]} minus {criteria[1]}: below 0, {criteria[0]} is better"
        axes.set(xlabel="layer that selects", ylabel="difference of perplexity", title=title)
        axes.locator_params("x", integer=True)
        return save(figure, folder, "fig4-layerwise-selection")


def draw_chosen_layers(plans: dict[str, dict[int, float]], num_layers: int, folder: Path) -> list[Path]:
    """Figure 5: the chosen layers of plans; a column's filled part is the share of tokens that the layer updates.

    Args:
        plans: by title, the ratio of each layer that is not dense.
    """
    with new_figure(860, 110 * len(plans) + 50) as figure:
        panels = figure.subplots(len(plans), 1, squeeze=False)[:, 0]
        for axes, (title, ratios) in zip(panels, plans.items(), strict=True):
            layer_strip(axes, [ratios.get(layer, 1.0) for layer in range(num_layers)])
            axes.set_title(title, loc="left", pad=5)
        panels[-1].set_xlabel("layer (full: dense; part: share of the tokens updated; empty: removed)")
        return save(figure, folder, "fig5-chosen-layers")


def _cosines(axes: "Axes", rows: Sequence[Sequence[float]], mean: str, sink_layer: int | None) -> None:
    """A thin line for each token and a thick one for their mean, over the layers; ``rows`` is ``[layers][tokens]``."""
    axes.plot(rows, color=LIGHT["dense"], linewidth=1)[0].set_label("each token")
    axes.plot([sum(row) / len(row) for row in rows], color=LIGHT["kept"], linewidth=2.5, label=mean)
    mark_sink(axes, sink_layer)
    axes.set_xlabel("layer")
    axes.locator_params("x", integer=True)
