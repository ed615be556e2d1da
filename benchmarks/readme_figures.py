"""Draw the pictures of the README and of the pages again, from committed results; nothing is measured.

Run: ``python benchmarks/readme_figures.py``. Reads ``benchmarks/results/demo/results.json`` and
``benchmarks/results/reproduce/smollm2-135m/summary.json``; writes ``docs/images/`` and the pictures beside the summary.
"""

import json
from pathlib import Path
from typing import Any

from orthorank.analysis import LayerComparison, figures
from orthorank.analysis.similarity import Similarities
from orthorank.common.files import write_text
from orthorank.common.plot import LIGHT, new_figure, svg
from orthorank.report import pictures, words
from orthorank.reproduce.markdown import titled

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "benchmarks/results/demo/results.json"
SUMMARY = ROOT / "benchmarks/results/reproduce/smollm2-135m/summary.json"
IMAGES = ROOT / "docs/images"
SHOWN = {  # in docs/images: the picture of the reproduction
    "sink-similarity.svg": "fig2-similarity-with-sink.svg",
    "sink-across-layers.svg": "fig3-similarity-across-layers.svg",
    "chosen-layers.svg": "fig5-chosen-layers.svg",
}


def draw_demo(results: dict[str, Any]) -> str:
    """The chosen layers above, perplexity and speed-up side by side below."""
    rows = results["rows"]
    changed = [row for row in rows if row["layers"] and not row["name"].endswith(words.CORRECTED)]
    with new_figure(800, 100 * len(changed) + 70 + 40 * len(rows)) as figure:
        names = [[str(number)] * 2 for number in range(len(changed))]
        panels = figure.subplot_mosaic([*names, ["perplexity", "speedup"]], height_ratios=[1] * len(changed) + [2.4])
        for number, row in enumerate(changed):
            pictures.layers(panels[str(number)], row, results["model_info"]["num_hidden_layers"], numbered=True)
            panels[str(number)].set_title(words.plan_title(row), loc="left", pad=5)
        for key, title in (("perplexity", "Perplexity: lower is better"), ("speedup", "Prefill speed-up, measured")):
            pictures.bars(panels[key], rows, key)
            panels[key].set_title(title, loc="left", pad=5)
        return svg(figure, words.verdict(results), alone=True) + "\n"


PROMPT = ("sink", "The", "cat", "sat", "on", "the", "mat", "because", "it", "was", "warm", ".")
SELECTED = (2, 6, 7, 10)  # an example, not a measurement


def draw_mechanism() -> str:
    """A row of tokens through a selected layer: all give keys and values, a third pass attention and MLP."""
    from matplotlib.patches import Rectangle

    with new_figure(800, 300) as figure:
        axes = figure.subplots()
        axes.set_xlim(-0.2, len(PROMPT) + 0.2)
        axes.set_ylim(-0.6, 5.6)
        axes.axis("off")

        def box(x: float, y: float, wide: float, colour: str, text: str, ink: str, weight: str = "normal") -> None:
            axes.add_patch(
                Rectangle((x, y), wide, 0.6, facecolor=LIGHT[colour], edgecolor=LIGHT["soft"], linewidth=0.5)
            )
            axes.text(x + wide / 2, y + 0.29, text, ha="center", va="center", color=LIGHT[ink], weight=weight)

        for i, token in enumerate(PROMPT):
            selected = i in SELECTED
            colour, ink = (
                ("kept", "paper") if selected else ("pruned" if i == 0 else "left-out", "paper" if i == 0 else "ink")
            )
            box(i + 0.06, 0, 0.88, colour, token, ink)
            box(
                i + 0.06,
                4.4,
                0.88,
                "kept" if selected else "left-out",
                "updated" if selected else "kept",
                "paper" if selected else "ink",
            )
            axes.plot([i + 0.5] * 2, [0.6, 1.2], color=LIGHT["soft"], linewidth=1)
            way = (
                {"color": LIGHT["kept"], "linewidth": 2.5} if selected else {"color": LIGHT["dense"], "linestyle": ":"}
            )
            axes.plot([i + 0.5] * 2, [1.8, 4.4], zorder=0, **way)
        box(
            0,
            1.2,
            len(PROMPT),
            "dense",
            "keys and values: of all tokens, so that the selected ones can attend to them",
            "ink",
            "bold",
        )
        box(0, 2.8, len(PROMPT), "rule", "attention and MLP: the selected tokens alone", "ink", "bold")
        middle = len(PROMPT) / 2
        axes.text(
            middle, -0.35, "tokens of the prompt; green: most orthogonal to the sink", ha="center", color=LIGHT["soft"]
        )
        axes.text(middle, 5.2, "the layer's output", ha="center", color=LIGHT["soft"])
        said = "A selected layer: keys and values of all tokens, attention and MLP of a third of them"
        return svg(figure, said, alone=True) + "\n"


def draw_reproduction(summary: dict[str, Any], folder: Path) -> list[Path]:
    """The paper's figures, as `orthorank reproduce` draws them."""
    similar, sink_layer = Similarities(**summary["similarities"]), summary["sink"]["sink_layer"]
    compared = [
        LayerComparison(one["layer"], tuple(one["losses"]), tuple(one["other_losses"])) for one in summary["layerwise"]
    ]
    plans = {titled(name): dict.fromkeys(plan["layers"], plan["keep_ratio"]) for name, plan in summary["fig5"].items()}
    return [
        *figures.draw_similarity_with_sink(similar, sink_layer, folder),
        *figures.draw_similarity_across_layers(similar, sink_layer, folder),
        *figures.draw_similarity_of_others(similar, sink_layer, folder),
        *figures.draw_layerwise(compared, ("orthogonal", "inverse"), folder),
        *figures.draw_chosen_layers(plans, summary["model"]["num_hidden_layers"], folder),
    ]


def main() -> None:
    write_text(IMAGES / "mechanism.svg", draw_mechanism())
    write_text(IMAGES / "demo.svg", draw_demo(json.loads(DEMO.read_text(encoding="utf-8"))))
    paths = draw_reproduction(json.loads(SUMMARY.read_text(encoding="utf-8")), SUMMARY.parent)
    for name, drawn in SHOWN.items():
        write_text(IMAGES / name, (SUMMARY.parent / drawn).read_text(encoding="utf-8"))
    for path in (IMAGES / "mechanism.svg", IMAGES / "demo.svg", *paths, *(IMAGES / name for name in SHOWN)):
        print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
