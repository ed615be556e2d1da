"""Draw the README's picture from the committed results of the demo.

Run: ``python benchmarks/readme_figures.py``. Reads ``benchmarks/results/demo/results.json`` and writes
``docs/images/demo.svg``.
"""

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from orthorank.files import write_text
from orthorank.report import words
from orthorank.report.page import COLOURS
from orthorank.report.pictures import bars, layer_stacks, svg, text

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PICTURE = ROOT / "benchmarks/results/demo/results.json", ROOT / "docs/images/demo.svg"
WIDTH, MARGIN, GAP = 800, 20, 36


def style() -> str:
    """The page's colours and the rules for pictures; the rest of its style sheet is for text."""
    css = files("orthorank.report").joinpath("page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{.*?\n\s*\}", css, re.DOTALL)
    rules = re.findall(r"^\.ink .*?(?=^@media)", css, re.DOTALL | re.MULTILINE)
    return f"<style>{light} @media (prefers-color-scheme: dark) {{ {dark} }} {' '.join(rules)}</style>"


def placed(picture: str, x: float, y: float) -> tuple[str, float]:
    """``picture`` at a place inside another one, and its height."""
    found = re.search(r'height="([\d.]+)"', picture)
    assert found is not None
    return picture.replace("<svg ", f'<svg x="{x:g}" y="{y:g}" ', 1), float(found[1])


def draw(results: dict[str, Any]) -> str:
    """The chosen layers above, perplexity and speed-up side by side below."""
    rows = results["rows"]
    changed = [row | {"title": words.plan_title(row)} for row in rows if row["layers"]]
    total = results["model_info"]["num_hidden_layers"]
    stacks, height = placed(layer_stacks(changed, total, WIDTH - 2 * MARGIN), MARGIN, MARGIN)
    y, half = MARGIN + height + 14, (WIDTH - 2 * MARGIN - GAP) / 2
    body = ['<rect width="100%" height="100%" style="fill:var(--paper)"/>', stacks]
    pairs = (("perplexity", "Perplexity: lower is better"), ("speedup", "Prefill speed-up, measured"))
    for number, (key, title) in enumerate(pairs):
        x = MARGIN + number * (half + GAP)
        entries = [(words.TITLES[r["name"]], r[key], words.shown(key, r[key]), COLOURS[r["name"]]) for r in rows]
        picture, height = placed(bars(entries, half, title), x, y + 22)
        body += [text(x, y + 10, title), picture]
    return svg(WIDTH, y + 22 + height + MARGIN / 2, [style(), *body], words.verdict(results)) + "\n"


def main() -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    write_text(PICTURE, draw(results))
    print(f"wrote {PICTURE.relative_to(ROOT)}: {words.verdict(results)}")


if __name__ == "__main__":
    main()
