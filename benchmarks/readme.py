"""Writes the README's tables from the committed results, so that no figure is typed by hand.

python benchmarks/readme.py           # rewrite the marked sections of README.md
python benchmarks/readme.py --check   # exit 1 when they are out of date
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"dense": "dense", "layer-pruning": "layer pruning (SLEB)", "orthorank": "OrthoRank"}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def demo_section() -> str:
    """The demo's table, and what it was measured on."""
    results = load("demo/results.json")
    rows = [
        [
            NAMES[row["name"]],
            str(len(row["layers"])) if row["layers"] else "",
            f"{row['nominal_sparsity']:.0%}",
            f"{row['perplexity']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}x",
            f"{row['flop_speedup']:.2f}x",
        ]
        for row in results["rows"]
    ]
    head = ["", "layers", "sparsity", "perplexity", "prefill tokens/s", "speed-up", "FLOP-ideal"]
    speed = results["speed"]
    note = (
        f"`{results['model']}` on a CPU ({speed['dtype']}, {speed['threads']} threads, prompts of {speed['prompt']:,} "
        f"tokens); text: {results['text']}. From "
        f"`orthorank demo --repeats {results['settings']['repeats']}`, in `benchmarks/results/demo/results.json`."
    )
    return f"{table(head, rows)}\n\n{note}"


def results_section() -> str:
    """One line for each benchmark: what, how much, by which command."""
    rows = [line for make in (prefill_rows, criteria_rows, import_rows) for line in make()]
    return table(["what", "measured", "command"], rows)


def prefill_rows() -> list[list[str]]:
    r = load("prefill_smollm2.json")
    what = (
        f"prefill of {r['speed']['prompt']:,} tokens, SmolLM2-135M, {len(r['layers'])} layers at ratio 1/3, "
        f"{r['speed']['threads']} CPU thread(s)"
    )
    figure = (
        f"{r['measured_speedup']:.3f}x of an ideal {r['flop_speedup']:.3f}x by FLOPs: "
        f"{r['measured_over_ideal']:.2f} of what is possible"
    )
    return [
        [
            what,
            figure,
            f"`python benchmarks/bench_prefill.py --threads {r['speed']['threads']} --json "
            "benchmarks/results/prefill_smollm2.json`",
        ]
    ]


def criteria_rows() -> list[list[str]]:
    r = load("criteria_smollm2.json")
    what = "one layer at a time, WikiText-2 validation: orthogonal better than inverse"
    margins = [layer["margin"] for layer in r["layers"].values()]
    figure = f"in {sum(m > 0 for m in margins)} of {len(margins)} layers, by {min(margins):.1%} to {max(margins):.1%}"
    return [[what, figure, "`python benchmarks/bench_criteria.py`"]]


def import_rows() -> list[list[str]]:
    r = load("import.json")
    figure = f"{r['orthorank_kernels']['wall_ms']:.0f} ms on top of `import torch`"
    return [
        [
            "`import orthorank_kernels`",
            figure,
            "`python benchmarks/bench_import.py --json benchmarks/results/import.json`",
        ]
    ]


def rewritten(text: str) -> str:
    """``text`` with the marked sections made anew."""
    for name, make in (("demo", demo_section), ("results", results_section)):
        pattern = rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}\n{make()}\n\n{m[2]}", text, flags=re.DOTALL)
        if not found:
            raise SystemExit(f"README.md has no section <!-- {name}:begin -->")
    return text


def main() -> int:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    fresh = rewritten(text)
    if "--check" in sys.argv[1:]:
        if fresh != text:
            print("README.md is out of date; run: python benchmarks/readme.py")
        return int(fresh != text)
    readme.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
