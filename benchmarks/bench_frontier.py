"""The frontier: what quality a plan keeps at each share of the dense model's FLOPs, and whose plans are on it.

Three methods, each plain and corrected: layers removed (SLEB), layers that select (OrthoRank), and both mixed. A method
lays one path: from the dense model on, each round changes the layer that costs least loss for a FLOP, on windows that
the maps are not fitted to, so every prefix of its order is a plan. Corrected paths are searched with the maps on. Plans
along a path then get maps fitted to all calibration windows, and are measured on two texts of the kinds that these are
of and on one of another. FLOPs are those of a prompt of 1,024 tokens with the logits of the last one, maps counted.

    python benchmarks/bench_frontier.py                          # all there is, kept in --state, goes on after a stop
    python benchmarks/bench_frontier.py --method removed,corrected --only search
    python benchmarks/bench_frontier.py --quick

On a CPU without bfloat16 units float32 is several times faster, and the default.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_budget import compare
from benchmarks.frontier.path import Path_, lay
from benchmarks.frontier.texts import Sizes, Windows, read_windows
from orthorank import OrthoRankConfig, OrthoRankError, apply, fit_correction
from orthorank.calibration.corrected_evaluator import CorrectedEvaluator
from orthorank.common.files import read_json, write_json
from orthorank.evaluation import perplexity, prefill_flops
from orthorank.models import load_model
from orthorank.search import Evaluator, candidate_layers
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import detect_sink

DATA = Path(__file__).parents[2] / "shared" / "data"
STATE = Path(__file__).parent / "results" / "frontier"
METHODS = {"removed": (0.0,), "selected": (1 / 3,), "mixed": (1 / 3, 0.0)}
LEVELS = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6)
TOKENS = 1024  # of the prompt whose FLOPs are counted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{method}{kind}" for method in METHODS for kind in ("", ",corrected")]
    parser.add_argument("--method", action="append", choices=names, help="may be given several times (default: all)")
    parser.add_argument("--only", choices=("search", "measure"), help="one half of the work")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="shares of FLOPs that are measured")
    parser.add_argument("--rank", type=int, default=64, help="of the maps (default: 64)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2/, c4/ and text/")
    parser.add_argument("--state", type=Path, default=STATE, help="folder for paths and cells (default: the results)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--quick", action="store_true", help="few and short windows: minutes, and no figure to quote")
    parser.add_argument("--json", type=Path, help="also write what is measured so far to this file")
    options = parser.parse_args()
    options.method = options.method or names
    return options


@dataclasses.dataclass
class Bench:
    """What all methods share."""

    model: Any
    windows: Windows
    select: list[int]
    rank: int
    state: Path

    def flops(self, plan: dict[int, float], corrected: bool) -> float:
        """Of a prompt, as a share of the dense model's."""
        ranks = dict.fromkeys(plan, self.rank) if corrected else {}
        config = self.model.config
        return prefill_flops(config, TOKENS, list(plan), plan, ranks=ranks) / prefill_flops(config, TOKENS)

    def path(self, name: str, sizes: Sizes, until: float, search: bool) -> Path_:
        """The path of a method; the part that is not there yet is searched for."""
        method, _, kind = name.partition(",")
        stack, judge = LayerStack(self.model), self.windows.judge
        evaluator = (
            CorrectedEvaluator(stack, judge, self.windows.fit, rank=self.rank, refit=False, batch_size=2)
            if kind
            else Evaluator(stack, judge, batch_size=2)
        )
        layers = self.select if method == "selected" else range(1, stack.num_layers - 1)
        ratios = {layer: [ratio for ratio in METHODS[method] if ratio == 0 or layer in self.select] for layer in layers}
        file = self.state / f"path-{name.replace(',', '-')}.json"
        path = Path_.load(file, f"{evaluator.fingerprint} {method} {sizes}")
        if search:
            began = time.process_time()

            def say(words: str) -> None:
                print(f"{name}: {words} ({(time.process_time() - began) / 60:.0f} min of CPU)", flush=True)

            lay(
                evaluator,
                path,
                ratios,
                lambda plan: self.flops(plan, bool(kind)),
                until=until,
                first=2,
                file=file,
                say=say,
            )
        return path

    def measure(self, name: str, plan: dict[int, float], corrected: bool) -> dict[str, Any]:
        """The losses of a plan on each text, window by window; measured once."""
        file = self.state / "cells" / f"{name.replace(',', '-')}-{key(plan)}.json"
        if file.exists():
            return read_json(file)
        given = OrthoRankConfig.for_model(self.model, layers=sorted(plan), keep_ratios=plan) if plan else None
        if given is not None and corrected:
            ids = torch.cat([self.windows.judge, self.windows.fit])
            given = fit_correction(self.model, ids, given, rank=self.rank)
        cell: dict[str, Any] = {"method": name, "plan": {str(layer): ratio for layer, ratio in sorted(plan.items())}}
        cell["flops"] = self.flops(plan, corrected)
        handle = apply(self.model, given) if given is not None else None
        try:
            cell["losses"] = {text: list(perplexity(self.model, ids).window_losses) for text, ids in self.tests()}
        finally:
            if handle is not None:
                handle.remove()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, cell)
        return cell

    def tests(self) -> list[tuple[str, Any]]:
        """The texts that are measured."""
        return list(self.windows.test.items())


def key(plan: dict[int, float]) -> str:
    """A short name for a plan: its hash."""
    return hashlib.sha256(json.dumps(sorted(plan.items())).encode()).hexdigest()[:12] if plan else "dense"


def at_level(path: Path_, level: float) -> int | None:
    """After how many changes a path comes to ``level`` of the FLOPs or less; None: it does not."""
    return next((rounds for rounds, share in enumerate(path.flops) if share <= level), None)


def row_of(cell: dict[str, Any], dense: dict[str, Any], level: float | None) -> dict[str, Any]:
    """Perplexities of a cell, and its losses against the dense model's, paired by window."""
    losses = {text: statistics.fmean(values) for text, values in cell["losses"].items()}
    return {
        "method": cell["method"],
        "level": level,
        "flops": round(cell["flops"], 4),
        "plan": cell["plan"],
        "perplexity": {text: round(math.exp(loss), 3) for text, loss in losses.items()},
        "against_dense": {text: compare(values, dense["losses"][text]) for text, values in cell["losses"].items()},
    }


def main() -> int:
    options = arguments()
    sizes = Sizes(fit=4, judge=2, tokens=128, test=2, test_tokens=256) if options.quick else Sizes()
    model, tokenizer, info = load_model(device="cpu", dtype=options.dtype)
    select = candidate_layers(detect_sink(model, tokenizer))
    options.state.mkdir(parents=True, exist_ok=True)
    if options.quick and options.state == STATE:
        raise OrthoRankError("--quick wants a folder of its own: name one with --state")
    bench = Bench(model, read_windows(tokenizer, options.data, sizes), select, options.rank, options.state)
    rows = []
    for name in options.method:
        path = bench.path(name, sizes, min(options.levels), options.only != "measure")
        if options.only == "search":
            continue
        dense = bench.measure("dense", {}, False)
        for level in options.levels:
            rounds = at_level(path, level)
            if rounds is None:
                print(f"{name}: its path does not come to {level} yet")
                continue
            cell = bench.measure(name, path.plan(rounds), name.endswith("corrected"))
            rows.append(row_of(cell, dense, level))
            figures = "  ".join(f"{text} {value:.2f}" for text, value in rows[-1]["perplexity"].items())
            print(f"{name:20} {rows[-1]['flops']:.3f}  {figures}", flush=True)
    if options.json is not None and rows:
        dense_row = row_of(dense, dense, None)
        about = {"model": info.name, "dtype": options.dtype, "rank": options.rank, "tokens": TOKENS}
        write_json(options.json, about | {"sizes": sizes._asdict(), "rows": [dense_row, *rows]})
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
