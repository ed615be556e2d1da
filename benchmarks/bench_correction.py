"""Ways to correct a plan, a row each: the plan as it is, the package's fit, and that fit with one thing changed.

Two plans of about the same share of the dense model's FLOPs: one of removed layers, from the frontier's corrected path
(`bench_frontier.py`), and the shipped one of layers that select, which was found without maps. Maps are fitted to
windows of which one half is WikiText-2's validation text and the other one documents of C4; measured are WikiText-2's
test text, other documents of C4, and speeches, of which kind no fit saw any. Differences are paired by window, against
the package's fit. FLOPs are those of a prompt of 1,024 tokens with the logits of the last one, maps counted; where a
variant has others than the package's fit, its difference is also given at equal FLOPs, by what one is worth on the
path.

    python benchmarks/bench_correction.py --json benchmarks/results/correction_smollm2.json

Each row is kept in --state as soon as it is measured, so a run that was stopped goes on.
"""

import argparse
import dataclasses
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.correction.fits import BothWindows, KeyValueWindows
from benchmarks.frontier.losses import TextLosses
from benchmarks.frontier.path import Path_, at_level
from benchmarks.frontier.texts import Sizes, read_windows
from benchmarks.paired import compare
from orthorank import OrthoRankConfig, OrthoRankError, distill_correction
from orthorank.calibration.corrections import corrected_plan, fit_layers
from orthorank.calibration.fitting import FitWindows
from orthorank.common.files import read_json, write_json
from orthorank.correction import LayerMap
from orthorank.evaluation import plan_flops, prefill_flops
from orthorank.models import load_model
from orthorank.plans import default_plan
from orthorank.stack.layers import LayerStack

DATA = Path(__file__).parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results"
PATH = RESULTS / "frontier" / "path-removed-corrected.json"
LEVEL = 0.82  # of the dense model's FLOPs, at most
TOKENS = 1024  # of a window that is measured, and of the prompt whose FLOPs are counted
FIT_TOKENS = 512  # of a window that is fitted to
PLANS = ("removed", "selected")


class Variant(NamedTuple):
    """How maps are fitted.

    Args:
        fit: how many windows are fitted to. windows: what fits. distil: steps on all windows afterwards.
    """

    rank: int = 64
    target: str = "dense"
    fit: int = 32
    windows: type[FitWindows] = FitWindows
    distil: int = 0


def fixed(ridge: float) -> type[FitWindows]:
    """Fits with one ridge, whatever held-out windows say."""
    return type("FixedRidge", (FitWindows,), {"ridges": (ridge,)})


USUAL = "corrected"
VARIANTS = {
    USUAL: Variant(),
    "rank 16": Variant(rank=16),
    "rank 128": Variant(rank=128),
    "target: the layer's own output": Variant(target="layer"),
    "4k tokens": Variant(fit=8),
    "64k tokens": Variant(fit=128),
    "64k tokens, rank 128": Variant(fit=128, rank=128),
    "ridge 0.0001": Variant(windows=fixed(1e-4)),
    "ridge 0.03": Variant(windows=fixed(0.03)),
    "of keys and values": Variant(windows=KeyValueWindows),
    "selected tokens, too": Variant(windows=BothWindows),
    "distilled, 64 steps": Variant(distil=64),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2/, c4/ and text/")
    parser.add_argument("--path", type=Path, default=PATH, help="of removed layers, from bench_frontier.py")
    parser.add_argument("--plan", action="append", choices=list(PLANS), help="may be given twice (default: both)")
    parser.add_argument("--variant", action="append", choices=list(VARIANTS), help="may be repeated (default: all)")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the rows that are in --state")
    parser.add_argument("--windows", type=int, default=16, help="windows of each text that is measured (default: 16)")
    parser.add_argument("--state", type=Path, default=RESULTS / "correction", help="folder for rows (default: results)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    options.plan, options.variant = options.plan or list(PLANS), options.variant or list(VARIANTS)
    return options


class Bench:
    """What all rows share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.model, tokenizer, self.info = load_model(device="cpu", dtype=options.dtype)
        self.state, self.kept, self.stack = options.state, options.kept, LayerStack(self.model)
        most = max(variant.fit for variant in VARIANTS.values())
        sizes = Sizes(fit=most, judge=0, tokens=FIT_TOKENS, test=options.windows, test_tokens=TOKENS)
        self.windows = read_windows(tokenizer, options.data, sizes)
        self.path = read_path(options.path)
        self.rounds = at_level(self.path, LEVEL)
        if self.rounds is None:
            raise OrthoRankError(
                f"the path ends at {self.path.flops[-1]:.3f} of the FLOPs; go on with bench_frontier.py"
            )
        removed = self.path.plan(self.rounds)
        self.plans = {
            "removed": OrthoRankConfig.for_model(self.model, layers=sorted(removed), keep_ratios=removed),
            "selected": dataclasses.replace(default_plan(self.model, "orthorank", 0.2), measured={}),
        }
        self.losses = TextLosses(self.stack, self.windows.test, min(min(plan.layers) for plan in self.plans.values()))

    def file(self, name: str) -> Path:
        """Where a row is kept."""
        return self.state / f"{re.sub(r'[^0-9a-z]+', '-', name)}.json"

    def row(self, name: str, variant: Variant | None, plan: OrthoRankConfig | None) -> dict[str, Any]:
        """Measure one row, unless it is there; without a plan the dense model, without a variant the plan as it is."""
        file = self.file(name)
        if file.exists():
            return read_json(file)
        if self.kept:
            raise OrthoRankError(f"--kept measures nothing, and {file} is not there; leave it out, or name a --plan")
        began = time.process_time()
        also: dict[int, LayerMap] = {}
        if plan is not None and variant is not None:
            plan, also = self.fitted(plan, variant)
        row: dict[str, Any] = {"name": name, "flops": self.flops(plan, also), "losses": self.losses.of(plan, also)}
        if plan is not None:
            row["plan"] = {str(layer): plan.ratio(layer) for layer in plan.layers}
            row |= {key: plan.calibration["correction"][key] for key in ("explained", "ridge") if plan.correction}
        row["processor_minutes"] = round((time.process_time() - began) / 60, 1)
        self.state.mkdir(parents=True, exist_ok=True)
        write_json(file, row)
        return row

    def fitted(self, plan: OrthoRankConfig, variant: Variant) -> tuple[OrthoRankConfig, dict[int, LayerMap]]:
        """The plan with its maps, and the maps of selected tokens."""
        made: list[FitWindows] = []

        def windows(*args: Any, **options: Any) -> FitWindows:
            made.append(variant.windows(*args, **options))
            return made[0]

        ids, how = self.windows.fit[: variant.fit], {"rank": variant.rank, "target": variant.target}
        walk = fit_layers(self.model, ids, plan, thresholds=False, fit_windows=windows, **how)
        fits = {layer: fitted for layer, _, fitted in walk if fitted is not None}
        found = corrected_plan(self.model, ids, plan, fits, **how)
        if variant.distil:
            found = distill_correction(self.model, self.windows.fit, found, steps=variant.distil)
        return found, getattr(made[0], "also", {})

    def flops(self, plan: OrthoRankConfig | None, also: dict[int, LayerMap]) -> float:
        """Of a prompt, as a share of the dense model's."""
        if plan is None:
            return 1.0
        config = self.model.config
        dense = prefill_flops(config, TOKENS)
        share = plan_flops(config, TOKENS, plan) / dense
        extra = sum(4 * of.down.numel() * plan.ratio(layer) * TOKENS for layer, of in also.items())
        return share + extra / dense


def read_path(file: Path) -> Path_:
    """A path as it was laid.

    Raises:
        OrthoRankError: it is not there.
    """
    if not file.exists():
        raise OrthoRankError(f"{file} is not there; run bench_frontier.py first")
    return Path_.load(file, read_json(file)["fingerprint"])


def slope(path: Path_, rounds: int) -> float:
    """Nats that a FLOP (as a share of the dense model's) is worth along a path, around one of its plans."""
    before, behind = rounds - 1, min(rounds + 1, len(path.changes))
    return (path.losses[before] - path.losses[behind]) / (path.flops[before] - path.flops[behind])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    bench = Bench(options)
    rows = [said(bench.row("dense", None, None), None, 0.0)]
    worth = slope(bench.path, bench.rounds)
    for title in options.plan:
        plan = bench.plans[title]
        usual = bench.row(f"{title}, {USUAL}", VARIANTS[USUAL], plan)
        rows += [said(bench.row(title, None, plan), usual, 0.0), said(usual, usual, 0.0)]
        for name in options.variant:
            if options.kept and not bench.file(f"{title}, {name}").exists():
                continue
            of_selected = VARIANTS[name].windows is BothWindows
            if name != USUAL and not (of_selected and title == "removed"):  # a removed layer selects no token
                rows.append(said(bench.row(f"{title}, {name}", VARIANTS[name], plan), usual, worth))
    return {
        "model": bench.info.name,
        "dtype": options.dtype,
        "windows": options.windows,
        "tokens": TOKENS,
        "fit_tokens": VARIANTS[USUAL].fit * FIT_TOKENS,
        "nats_for_a_share_of_flops": round(worth, 3),
        "rows": rows,
    }


def said(row: dict[str, Any], usual: dict[str, Any] | None, worth: float) -> dict[str, Any]:
    """A row of the result, printed: its perplexities, and how far its losses are from the package's fit."""
    found = {key: value for key, value in row.items() if key != "losses"}
    means = {text: statistics.fmean(values) for text, values in row["losses"].items()}
    found["perplexity"] = {text: round(math.exp(mean), 3) for text, mean in means.items()}
    found["against_usual"] = {}
    if usual is not None and row["name"] != usual["name"]:
        found["against_usual"] = {
            text: compare(values, usual["losses"][text]) for text, values in row["losses"].items()
        }
        for apart in found["against_usual"].values():
            apart["at_equal_flops"] = apart["difference"] - worth * (row["flops"] - usual["flops"])
    figures = "  ".join(f"{text} {value:.2f}" for text, value in found["perplexity"].items())
    print(f"{row['name']:46} {row['flops']:.4f}  {figures}", flush=True)
    return found


def main() -> int:
    options = arguments()
    torch.set_grad_enabled(False)
    found = measure(options)
    if options.json is not None:
        write_json(options.json, found)
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
