"""Corrected plans against the same plans as they are, on texts that are like the fit's and on one that is not.

The plans that come with the package, OrthoRank's (nine layers at a third) and SLEB's (six removed), get maps fitted to
windows that are half WikiText-2's validation text and half documents of C4. Measured are WikiText-2's test text, other
documents of C4, and speeches. FLOPs are those of a prompt of ``--window`` tokens against the dense model's, maps
counted.

    python benchmarks/bench_correction.py --json benchmarks/results/correction_smollm2.json
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_budget import compare, cut
from benchmarks.frontier.texts import read_texts
from orthorank import OrthoRankConfig, apply, fit_correction
from orthorank.common.files import write_json
from orthorank.evaluation import flop_speedup, perplexity
from orthorank.models import load_model
from orthorank.plans import default_plan

DATA = Path(__file__).parents[2] / "shared" / "data"
LATER = 800_000  # the character of the C4 sample from which documents are measured on; the fit ends far before it
PLANS = {"orthorank": "nine layers at a third", "layer-pruning": "six layers removed"}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2/, c4/ and text/")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window (default: 256)")
    parser.add_argument(
        "--fit-windows", type=int, default=24, help="windows of the fit, half of each text (default: 24)"
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of each text that is measured (default: 8)")
    parser.add_argument("--rank", type=int, default=64, help="of the maps (default: 64)")
    parser.add_argument("--target", default="dense", help="of the fit: dense or layer (default: dense)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def texts(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """What the fit reads, and what is measured."""
    validation, measured, documents = read_texts(folder)
    joined = " ".join(documents)
    measured = {"WikiText-2": measured["WikiText-2"], "C4": joined[LATER:], "speeches": measured["speeches"]}
    return {"WikiText-2": validation, "C4": joined[: LATER // 2]}, measured


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, info = load_model(device="cpu", dtype=options.dtype)

    def windows(text: str, count: int, name: str) -> torch.Tensor:
        ids = tokenizer(text[: 12 * count * options.window], add_special_tokens=False, verbose=False)["input_ids"]
        return cut(ids, options.window, count, name)

    fitted, measured = texts(options.data)
    half = options.fit_windows // 2
    ids = torch.cat([windows(text, half, f"the fit's {name}") for name, text in fitted.items()])
    held_out = {name: windows(text, options.windows, name) for name, text in measured.items()}
    rows: list[dict[str, Any]] = []

    def row(title: str, plan: OrthoRankConfig | None, plain: dict[str, list[float]] | None) -> dict[str, list[float]]:
        found = {name: perplexity(model, each) for name, each in held_out.items()}
        losses = {name: list(result.window_losses) for name, result in found.items()}
        ratios = (model.config, options.window, plan.layers, plan.ratios) if plan else None
        rows.append(
            {
                "name": title,
                "flops": 1 / flop_speedup(*ratios, ranks=plan.ranks) if ratios and plan else 1.0,
                "perplexity": {name: result.perplexity for name, result in found.items()},
                "against_plain": {name: compare(losses[name], plain[name]) for name in losses} if plain else {},
            }
        )
        print(f"{title:40} " + "  ".join(f"{n} {r.perplexity:.2f}" for n, r in found.items()), flush=True)
        return losses

    began = time.process_time()
    row("dense", None, None)
    for kind, title in PLANS.items():
        plan = default_plan(model, kind, 0.2)
        with apply(model, plan):
            plain = row(title, plan, None)
        found = fit_correction(model, ids, plan, rank=options.rank, target=options.target)
        with apply(model, found):
            row(f"{title}, corrected", found, plain)
        rows[-1]["explained"] = found.calibration["correction"]["explained"]
    return {
        "model": info.name,
        "dtype": options.dtype,
        "rank": options.rank,
        "target": options.target,
        "window": options.window,
        "windows": options.windows,
        "fit_tokens": ids.numel(),
        "processor_minutes": round((time.process_time() - began) / 60, 1),
        "rows": rows,
    }


def main() -> int:
    options = arguments()
    found = measure(options)
    if options.json is not None:
        write_json(options.json, found)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
