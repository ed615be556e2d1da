"""What it is worth in quality to round each keep count up to a multiple: perplexity with `keep_multiple` 1, 64, 128.

The shipped plan of SmolLM2-135M-Instruct on WikiText-2 test, in windows of 512 and of 2,048 tokens. Losses are paired
with those of the plan without a multiple. FLOPs are counted for prompts of these lengths; what rounding costs in
time is for a GPU to say: a product of 682 rows takes as many tiles of 128 rows as one of 768.

    python benchmarks/bench_multiple.py --json benchmarks/results/multiple_smollm2.json
    python benchmarks/bench_multiple.py --quick
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_modes import DATA, measured, read_ids
from benchmarks.paired import compare
from orthorank import OrthoRankError
from orthorank.common.files import write_json
from orthorank.evaluation import plan_flops, prefill_flops
from orthorank.models import load_model
from orthorank.plans import default_plan
from orthorank_kernels import keep_count

LENGTHS = {512: 32, 2048: 8}  # tokens of a window, and how many windows
MULTIPLES = (1, 64, 128)


def rows_of(model: Any, plan: Any, ids: Any, tokens: int) -> list[dict[str, Any]]:
    """A row for each multiple, for windows of so many tokens."""
    rows: list[dict[str, Any]] = []
    losses: dict[int, list[float]] = {}
    dense = measured(model, None, ids, f"{tokens} tokens, dense")
    for multiple in MULTIPLES:
        followed = dataclasses.replace(plan, keep_multiple=multiple)
        found = measured(model, followed, ids, f"{tokens} tokens, multiples of {multiple}")
        losses[multiple] = found["window_losses"]
        flops = plan_flops(model.config, tokens, followed)
        rows.append(
            {
                "tokens": tokens,
                "multiple": multiple,
                "updated": keep_count(tokens, plan.keep_ratio, multiple=multiple),
                "flops": round(flops / prefill_flops(model.config, tokens), 4),
                "perplexity": found["perplexity"],
                "dense": dense["perplexity"],
                "against_1": compare(losses[multiple], losses[1]),
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wiki.test.raw")
    parser.add_argument("--quick", action="store_true", help="two windows of each length: no figure to quote")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    model, tokenizer, info = load_model(device="cpu", dtype="float32")
    plan = default_plan(model, sparsity=0.2)
    rows = []
    try:
        for tokens, windows in LENGTHS.items():
            count = 2 if options.quick else windows
            ids, sha = read_ids(options.data / "wiki.test.raw", tokenizer, count, tokens, False)
            rows += rows_of(model, plan, ids, tokens)
    except OrthoRankError as error:
        print(f"bench_multiple: {error}", file=sys.stderr)
        return 2
    print("tokens  multiple  updated  FLOPs  perplexity  loss against no multiple")
    for row in rows:
        against = row["against_1"]
        print(
            f"{row['tokens']:6} {row['multiple']:9} {row['updated']:8}  {row['flops']:.3f}  {row['perplexity']:10.2f}  "
            f"{against['difference']:+.4f} ±{against['standard_error']:.4f}"
        )
    if options.json is not None:
        about = {"model": info.to_dict(), "layers": plan.layers, "text_sha256": sha, "windows": LENGTHS}
        write_json(options.json, about | {"rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
