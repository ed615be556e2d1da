"""The frontier: what quality a plan keeps at each share of the dense model's FLOPs, and whose plans are on it.

Three methods, each plain, corrected and distilled: layers removed (SLEB), layers that select (OrthoRank), and both
mixed. A method lays one path: from the dense model on, each round changes the layer that costs least loss for a FLOP,
on windows that the maps are not fitted to, so every prefix of its order is a plan. Corrected paths are searched with
the maps on; distilled plans are those of the corrected path. Plans along a path then get maps that are fitted to 128
windows, those of the search among them; distilled ones have theirs fitted to the search's windows and trained on the
128, each seen once. All are measured on two texts of the kinds that these are of and on one of another. FLOPs are those
of a prompt of 1,024 tokens with the logits of the last one, maps counted.

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

from benchmarks.frontier.curve import SHARES, compared
from benchmarks.frontier.losses import TextLosses
from benchmarks.frontier.path import Path_, at_level, lay
from benchmarks.frontier.texts import Sizes, Windows, read_windows
from benchmarks.paired import compare
from orthorank import OrthoRankConfig, OrthoRankError, distill_correction, fit_correction
from orthorank.calibration.corrected_evaluator import CorrectedEvaluator
from orthorank.common.files import read_json, write_json
from orthorank.evaluation import prefill_flops
from orthorank.models import load_model
from orthorank.search import Evaluator, candidate_layers
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import detect_sink

DATA = Path(__file__).parents[2] / "shared" / "data"
STATE = Path(__file__).parent / "results" / "frontier"
METHODS = {"removed": (0.0,), "selected": (1 / 3,), "mixed": (1 / 3, 0.0)}
LEVELS = (0.96, 0.92, 0.87, 0.82, 0.72, 0.62)
TOKENS = 1024  # of the prompt whose FLOPs are counted
KINDS = ("", ",corrected", ",distilled")
STEPS, MORE = 64, 128  # of a distillation, and the windows of the last fit or of the distillation


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [f"{method}{kind}" for method in METHODS for kind in KINDS]
    parser.add_argument("--method", action="append", choices=names, help="may be given several times (default: all)")
    parser.add_argument("--only", choices=("search", "measure"), help="one half of the work")
    parser.add_argument("--levels", type=float, nargs="+", default=LEVELS, help="shares of FLOPs that are measured")
    parser.add_argument("--rank", type=int, default=64, help="of the maps (default: 64)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2/, c4/ and text/")
    parser.add_argument("--state", type=Path, default=STATE, help="folder for paths and cells (default: the results)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--kept", action="store_true", help="compute nothing: what is in --state")
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
    steps: int
    kept: bool
    losses: TextLosses | None = None

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
        file = self.state / f"path-{method}{'-corrected' if kind else ''}.json"
        path = Path_.load(file, f"{evaluator.fingerprint} {method} {sizes}")
        if search and kind != "distilled":
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

    def file(self, name: str, plan: dict[int, float]) -> Path:
        """Where the losses of a plan are kept."""
        return self.state / "cells" / f"{name.replace(',', '-')}-{key(plan)}.json"

    def measure(self, name: str, plan: dict[int, float], first: int = 0) -> dict[str, Any]:
        """The losses of a plan on each text, window by window; measured once.

        Args:
            first: the lowest layer that a plan of this method changes.
        """
        file = self.file(name, plan)
        if file.exists():
            return read_json(file)
        if self.kept:
            raise OrthoRankError(f"--kept computes nothing, and {file} is not there; leave it out")
        given = self.config(name, plan)
        cell: dict[str, Any] = {"method": name, "plan": {str(layer): ratio for layer, ratio in sorted(plan.items())}}
        cell["flops"] = self.flops(plan, "," in name)
        if self.losses is None or self.losses.first != first:
            self.losses = TextLosses(LayerStack(self.model), self.windows.test, first)
        cell["losses"] = self.losses.of(given)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, cell)
        return cell

    def config(self, name: str, plan: dict[int, float]) -> OrthoRankConfig | None:
        """A plan with the maps of its method, if it has any; None: the dense model."""
        if not plan:
            return None
        given = OrthoRankConfig.for_model(self.model, layers=sorted(plan), keep_ratios=plan)
        kind = name.partition(",")[2]
        if kind:
            of_search = torch.cat([self.windows.judge, self.windows.fit])
            ids = of_search if kind == "distilled" else self.windows.more
            given = fit_correction(self.model, ids, given, rank=self.rank)
        if kind == "distilled":
            kept = self.state / f"distilling-{key(plan)}.safetensors"
            how: dict[str, Any] = {"steps": self.steps, "save_to": kept, "on_step": say}
            given = distill_correction(self.model, self.windows.more, given, **how)
            kept.unlink(missing_ok=True)
        return given


def say(done: int, steps: int, loss: float) -> None:
    """Now and then, how far a distillation is."""
    if done % 8 == 0:
        print(f"  distilling: step {done} of {steps}, KL {loss:.3f}", flush=True)


def key(plan: dict[int, float]) -> str:
    """A short name for a plan: its hash."""
    return hashlib.sha256(json.dumps(sorted(plan.items())).encode()).hexdigest()[:12] if plan else "dense"


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
    windows = read_windows(tokenizer, options.data, sizes, 8 if options.quick else MORE)
    bench = Bench(model, windows, select, options.rank, options.state, 4 if options.quick else STEPS, options.kept)
    rows = []
    cells: dict[str, list[dict[str, Any]]] = {}
    for name in options.method:
        path = bench.path(name, sizes, min(options.levels), options.only != "measure" and not options.kept)
        if options.only == "search":
            continue
        dense = bench.measure("dense", {})
        for level in options.levels:
            rounds = at_level(path, level)
            if rounds is None:
                print(f"{name}: its path does not come to {level} yet")
                continue
            if options.kept and not bench.file(name, path.plan(rounds)).exists():
                continue
            cell = bench.measure(name, path.plan(rounds), min(path.plan()))
            rows.append(row_of(cell, dense, level))
            cells.setdefault(name, [dense]).append(cell)
            figures = "  ".join(f"{text} {value:.2f}" for text, value in rows[-1]["perplexity"].items())
            print(f"{name:20} {rows[-1]['flops']:.3f}  {figures}", flush=True)
    if options.json is not None and rows:
        dense_row = row_of(dense, dense, None)
        about = {"model": info.name, "dtype": options.dtype, "rank": options.rank, "tokens": TOKENS, "steps": STEPS}
        equal = {str(share): compared(cells, share) for share in SHARES}
        write_json(
            options.json, about | {"sizes": sizes._asdict(), "rows": [dense_row, *rows], "at_equal_flops": equal}
        )
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
