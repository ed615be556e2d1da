"""Zero-shot accuracy of the frontier's plans: the paper's five tasks, 200 rows of each, differences paired by row.

The plans are those of `bench_frontier.py` at one share of the dense model's FLOPs, with the maps of their method. Each
task of each plan is kept in --state as soon as it is measured, so a run that was stopped goes on.

    python benchmarks/bench_zeroshot.py --json benchmarks/results/zeroshot_smollm2.json

A plan takes about 30 minutes of one core, and its maps five more, or fifteen where they are distilled.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_frontier import DATA, MORE, STATE, STEPS, Bench, key
from benchmarks.frontier.path import at_level
from benchmarks.frontier.texts import Sizes, read_windows
from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.common.files import read_json, write_json
from orthorank.evaluation.task_scores import evaluate_tasks, task_differences
from orthorank.models import load_model
from orthorank.search import candidate_layers
from orthorank.stack.sink import detect_sink

TASKS = tuple(f"{name}_offline" for name in ("piqa", "winogrande", "hellaswag", "arc_easy", "arc_challenge"))
PLANS = Path("build") / "frontier-plans"
KINDS = ("removed", "selected", "removed,corrected", "selected,corrected", "removed,distilled", "mixed,corrected")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", action="append", choices=KINDS, help="may be given several times (default: all)")
    parser.add_argument("--level", type=float, default=0.82, help="share of FLOPs (default: 0.82)")
    parser.add_argument("--limit", type=int, default=200, help="rows of each task (default: 200)")
    parser.add_argument("--rank", type=int, default=64, help="of the maps (default: 64)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with lm_eval_tasks/ and the frontier's texts")
    parser.add_argument("--state", type=Path, default=STATE, help="folder with paths and cells (default: the results)")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the methods that are whole in --state")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    options.method = options.method or list(KINDS)
    return options


def measured(bench: Bench, name: str, plan: dict[int, float], tokenizer: Any, options: argparse.Namespace) -> Any:
    """The five tasks of one plan, those that are kept already among them; None: --kept, and not all of them are."""
    folder, config, rows = bench.state / "tasks", None, []
    for task in TASKS:
        file = folder / f"{name.replace(',', '-')}-{key(plan)}-{task.partition('_off')[0]}.json"
        if not file.exists():
            if options.kept:
                return None
            config = config or fitted(bench, name, plan)
            given: dict[str, Any] = {"plan": config, "include_path": options.data / "lm_eval_tasks", "samples": True}
            found = evaluate_tasks(bench.model, tokenizer, [task], limit=options.limit, **given)
            row = found["tasks"][0] | {"limit": options.limit, "harness": found["harness"]}
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, row)
            print(f"{name:20} {row['task']:24} {100 * row['value']:.1f}", flush=True)
        rows.append(read_json(file))
        if rows[-1]["limit"] != options.limit:
            raise OrthoRankError(f"{file} is of {rows[-1]['limit']} rows and --limit is {options.limit}")
    return {"tasks": rows}


def fitted(bench: Bench, name: str, plan: dict[int, float]) -> OrthoRankConfig | None:
    """The plan with its maps, which are fitted once: a run that goes on finds them in `PLANS`."""
    folder = PLANS / f"{name.replace(',', '-')}-{key(plan)}"
    if not plan:
        return None
    if not folder.exists():
        config = bench.config(name, plan)
        assert config is not None
        config.save_pretrained(folder)
    return OrthoRankConfig.from_pretrained(folder)


def row_of(name: str, flops: float, found: dict[str, Any], dense: dict[str, Any]) -> dict[str, Any]:
    """Accuracies in per cent, and their differences from the dense model's."""
    values = {row["task"].partition("_off")[0]: round(100 * row["value"], 2) for row in found["tasks"]}
    return {
        "method": name,
        "flops": round(flops, 4),
        "tasks": values,
        "rows": [row["rows"] for row in found["tasks"]],
        "mean": round(sum(values.values()) / len(values), 2),
        "against_dense": in_per_cent(task_differences(dense, found)),
    }


def in_per_cent(found: dict[str, Any]) -> dict[str, float]:
    """The mean difference over tasks with its standard error."""
    return {name: round(100 * found[name], 2) for name in ("mean", "standard_error")}


def main() -> int:
    options = arguments()
    sizes = Sizes()
    model, tokenizer, info = load_model(device="cpu", dtype="float32")
    select = candidate_layers(detect_sink(model, tokenizer))
    windows = read_windows(tokenizer, options.data, sizes, MORE)
    bench = Bench(model, windows, select, options.rank, options.state, STEPS, options.kept)
    dense = measured(bench, "dense", {}, tokenizer, options)
    if dense is None:
        raise OrthoRankError(f"--kept measures nothing, and the dense model is not in {options.state}; leave it out")
    rows, found = [row_of("dense", 1.0, dense, dense)], {}
    for name in options.method:
        path = bench.path(name, sizes, options.level, search=False)
        rounds = at_level(path, options.level)
        if rounds is None:
            print(f"{name}: its path does not come to {options.level} yet")
            continue
        plan = path.plan(rounds)
        found[name] = measured(bench, name, plan, tokenizer, options)
        if found[name] is not None:
            rows.append(row_of(name, bench.flops(plan, "," in name), found[name], dense))
            method, _, kind = name.partition(",")
            removed = found.get(f"removed,{kind}" if kind else "removed")
            if method != "removed" and removed is not None:
                rows[-1]["against_removed"] = in_per_cent(task_differences(removed, found[name]))
    if options.json is not None:
        about = {"model": info.name, "dtype": "float32", "rank": options.rank, "limit": options.limit}
        write_json(options.json, about | {"level": options.level, "rows": rows})
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except OrthoRankError as error:
        sys.exit(f"bench_zeroshot: {error}")
