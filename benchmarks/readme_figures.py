"""Draw the pictures of the README and of the pages again, from committed results; nothing is measured.

Run: ``python benchmarks/readme_figures.py``. Reads ``benchmarks/results/demo/results.json`` and
``benchmarks/results/reproduce/smollm2-135m/summary.json``; writes ``docs/images/`` and the pictures beside the summary.
"""

import json
from pathlib import Path
from typing import Any

from orthorank.analysis import LayerComparison, figures
from orthorank.analysis.similarity import Similarities
from orthorank.common import format as words
from orthorank.common.files import write_text
from orthorank.common.plot import new_figure, svg
from orthorank.report import pictures
from orthorank.reproduce.shown import titled

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
    write_text(IMAGES / "demo.svg", draw_demo(json.loads(DEMO.read_text(encoding="utf-8"))))
    paths = draw_reproduction(json.loads(SUMMARY.read_text(encoding="utf-8")), SUMMARY.parent)
    for name, drawn in SHOWN.items():
        write_text(IMAGES / name, (SUMMARY.parent / drawn).read_text(encoding="utf-8"))
    for path in (IMAGES / "demo.svg", *paths, *(IMAGES / name for name in SHOWN)):
        print(f"wrote {path.relative_to(ROOT)}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
