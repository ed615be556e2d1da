"""Mixed plans against plans of one form: calibration and held-out loss at equal FLOPs.

The plans that come with the package, OrthoRank's (nine layers at a third) and SLEB's (six removed), are both of 20 %
nominal sparsity. The budget search begins from both. At the FLOPs of each, the best mixed plan found is compared
with them: on the calibration windows (WikiText-2 validation, joined as for the plans) and on held-out ones (test).

    python benchmarks/bench_budget.py --json benchmarks/results/budget_smollm2.json
    python benchmarks/bench_budget.py --state budget-state.json    # goes on after a stop
"""

import argparse
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_criteria import JOINED, read_text
from contrib.budget.budget import BudgetInterrupted, BudgetState, Effort, Progress, best_plan, budget_search
from contrib.budget.costs import count_flops
from contrib.budget.pareto import Point, front_of
from contrib.budget.plan_loss import CalibrationLoss
from contrib.budget.plans import Space, key_of, plan_of
from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.common.files import write_json
from orthorank.evaluation import perplexity
from orthorank.models import load_model
from orthorank.plans import default_plan
from orthorank.search import Evaluator, candidate_layers
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import detect_sink

DATA = Path(__file__).parents[2] / "shared" / "data" / "wikitext2"
RATIOS = (1 / 2, 1 / 3, 1 / 4, 0.0)
TOKENS = 2048  # of the prompt whose FLOPs are counted


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wiki.valid.tokens and wiki.test.raw")
    parser.add_argument("--windows", type=int, default=6, help="calibration windows of 512 tokens (default: 6)")
    parser.add_argument("--held-out", type=int, default=12, help="held-out windows of 1,024 tokens (default: 12)")
    parser.add_argument("--budget", type=float, default=0.8, help="share of the dense layers' FLOPs (default: 0.8)")
    parser.add_argument("--dtype", default="float32", help="of the model (default: float32)")
    parser.add_argument("--effort", type=int, nargs=3, default=(3, 32, 16), help="tries, exchanges, patience")
    parser.add_argument("--state", type=Path, help="file to go on from after a stop")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def cut(ids: list[int], length: int, windows: int, name: str) -> torch.Tensor:
    """The first ``[windows, length]`` tokens."""
    if len(ids) < length * windows:
        raise OrthoRankError(f"{name} has {len(ids)} tokens; {windows} windows of {length} need {length * windows}")
    return torch.tensor(ids[: length * windows]).view(windows, length)


def search(options: argparse.Namespace, model: Any, ids: torch.Tensor, select: list[int]) -> tuple[BudgetState, Space]:
    """The search from both shipped plans, with a line for every tenth answer."""
    given = {
        name: plan_of(default_plan(model, kind, 0.2))
        for name, kind in (("OrthoRank", "orthorank"), ("SLEB", "layer-pruning"))
    }
    costs = count_flops(model.config, TOKENS, {*RATIOS, *(r for plan in given.values() for r in plan.values())})
    space = Space.of(costs, RATIOS, select=select, skip=range(1, costs.num_layers - 1))
    losses = CalibrationLoss(Evaluator(LayerStack(model), ids, batch_size=1))
    state = BudgetState.load(options.state) if options.state is not None and options.state.is_file() else None

    def tell(progress: Progress) -> None:
        if progress.done % 10 == 0:
            spent = time.process_time() / 60
            line = f"{progress.done:4} of about {progress.expected}, {spent:5.1f} min of CPU: {progress.phase}"
            print(f"{line}; best {progress.best:.4f}", flush=True)

    found = budget_search(
        losses, space, options.budget, starts=given, effort=Effort(*options.effort), state=state, on_progress=tell,
        save_to=options.state,
    )  # fmt: skip
    return found, space


def rows_of(state: BudgetState, space: Space, budget: float) -> list[tuple[str, Point]]:
    """The dense model, each given plan and the best mixed plan at its cost, and the best one within the budget."""
    points = {key_of(point.plan): point for point in state.points(space)}
    rows = [("dense", points[()])]
    for key, name in state.origins.items():
        if key != ():
            share = points[key].cost / space.costs.dense
            rows += [(name, points[key]), (f"mixed, at the FLOPs of {name}", best_plan(state, space, share))]
    return [*rows, (f"mixed, budget {budget:g}", best_plan(state, space, budget))]


def held_out_losses(model: Any, point: Point, ids: torch.Tensor) -> list[float]:
    """The loss of each window by the patched model itself."""
    if not point.plan:
        return list(perplexity(model, ids).window_losses)
    plan = OrthoRankConfig.for_model(model, layers=list(point.plan), keep_ratios=dict(point.plan))
    with apply(model, plan):
        return list(perplexity(model, ids).window_losses)


def compare(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Mean difference of the losses, with its standard error between windows (paired)."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {"difference": statistics.fmean(differences), "standard_error": error}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    valid, valid_sha = read_text(options.data / "wiki.valid.tokens")
    test_file = options.data / "wiki.test.raw"
    model, tokenizer, info = load_model(device="cpu", dtype=options.dtype)
    ids = cut(tokenizer(valid, verbose=False)["input_ids"], 512, options.windows, "the calibration text")
    test = test_file.read_text(encoding="utf-8")
    held_out = cut(tokenizer(test, verbose=False)["input_ids"], 1024, options.held_out, "the held-out text")
    sink = detect_sink(model, tokenizer)
    state, space = search(options, model, ids, candidate_layers(sink))
    spent = time.process_time()
    rows = rows_of(state, space, options.budget)
    losses: dict[Any, list[float]] = {}
    for _, point in rows:
        if (key := key_of(point.plan)) not in losses:
            losses[key] = held_out_losses(model, point, held_out)
    fixed = {name: losses[key] for key, name in state.origins.items() if key != ()}
    print(f"\n{'':32}  FLOPs  calibration  held-out  perplexity")
    result = []
    for name, point in rows:
        own = losses[key_of(point.plan)]
        mean, share = statistics.fmean(own), point.cost / space.costs.dense
        print(f"{name:32}  {share:5.3f}  {point.loss:11.4f}  {mean:8.4f}  {math.exp(mean):10.2f}", flush=True)
        entry = {
            "name": name,
            "flops": share,
            "calibration_loss": point.loss,
            "held_out_loss": mean,
            "held_out_perplexity": math.exp(mean),
            "plan": {str(layer): ratio for layer, ratio in point.plan.items()},
        }
        if name.startswith("mixed"):
            entry["against"] = {other: compare(own, theirs) for other, theirs in fixed.items()}
        result.append(entry)
    front = front_of(state.points(space))
    return {
        "model": info.to_dict(),
        "torch": torch.__version__,
        "text": f"WikiText-2 validation (wiki.valid.tokens, {len(JOINED)} joins)",
        "text_sha256": valid_sha,
        "windows": options.windows,
        "window": 512,
        "held_out": f"WikiText-2 test (wiki.test.raw), first {options.held_out} windows of 1024",
        "budget": options.budget,
        "flops_of_prompt": TOKENS,
        "keep_ratios": list(RATIOS),
        "effort": list(options.effort),
        "evaluations": state.evaluations,
        "cpu_minutes": round(spent / 60, 1),
        "rows": result,
        "front": [{"flops": p.cost / space.costs.dense, "loss": p.loss} for p in front],
    }


def main() -> int:
    options = arguments()
    try:
        result = measure(options)
        if options.json is not None:
            write_json(options.json, result)
    except BudgetInterrupted as stop:
        print(f"bench_budget: {stop}; go on with the same --state", file=sys.stderr)
        return 2
    except (OrthoRankError, OSError, UnicodeDecodeError) as error:
        print(f"bench_budget: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
