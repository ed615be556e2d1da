"""Bytes that every op asks memory for against the fewest it could, and pairs that attention computes for nothing.

    python benchmarks/byte_report.py            # writes benchmarks/results/bytes.json
    python benchmarks/byte_report.py --check    # writes nothing; exit 1 when a limit is broken

Kernels run in Triton's interpreter, which counts (see `benchmarks/traffic/counting.py`). *unique* is what is touched at
all, *requested* what all programs ask for, both over the fewest bytes that any kernel has to move. Query-key pairs come
from the launch settings alone (`benchmarks/static/pairs.py`): S tokens, every third of them selected at random. No GPU
is used. ``--check`` prints the worst ratio of a figure to its limit as the last word.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is first imported
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from rich.progress import track

from benchmarks.static.case import TARGETS
from benchmarks.static.pairs import count_pairs, selected_positions
from benchmarks.static.run import triton_version
from benchmarks.traffic.cases import broken_limits, cases, count
from benchmarks.traffic.peers import attention_peers, counted_peers, top_k_and_sort

RESULTS = Path(__file__).resolve().parent / "results" / "bytes.json"
TOKENS = (2048, 32768)
Figures = list[dict[str, Any]]


def attention_pairs(target: str, head_dim: int, group: int, tokens: int) -> dict[str, Any]:
    """With the settings that the launcher takes for bfloat16 on this target."""
    from orthorank_kernels.triton.configs import launch_settings

    settings, _, _ = launch_settings(head_dim, group, torch.bfloat16, target)
    tile = {"block_m": settings["BLOCK_M"], "block_n": settings["BLOCK_N"], "pack": settings["PACK"]}
    pairs = count_pairs(selected_positions(tokens, tokens // 3), group=group, **tile)
    return {
        "target": target,
        "head_dim": head_dim,
        "group": group,
        "tokens": tokens,
        "selected": tokens // 3,
        **tile,
        "executed_over_needed": round(pairs.ratio, 4),
        "masked_share": round(pairs.masked_share, 4),
    }


def pair_limits(figures: dict[str, Any]) -> dict[str, float]:
    """For four heads that share a tile: one head alone pays for the length of its tile.

    A tile of 32 queries of 2048 keys spans 96 of them, and with blocks of 128 keys the mask reaches 32 keys further at
    either end on average than with blocks of 64. They stay where they save more instructions in the loop than that.
    """
    wide = figures["block_n"] > 64
    if figures["group"] == 1:
        return {}
    if figures["tokens"] == 2048:
        return {"executed_over_needed": 1.15, "masked_share": 0.2 if wide else 0.15}
    return {"executed_over_needed": 1.01}


def all_pairs() -> Figures:
    return [
        attention_pairs(target, head_dim, group, tokens)
        for target in TARGETS
        for head_dim in (64, 128)
        for group in (4, 1)
        for tokens in TOKENS
    ]


def pair_complaints(figures: dict[str, Any]) -> list[str]:
    return [
        f"attention on {figures['target']}, head_dim {figures['head_dim']}, {figures['tokens']:,} tokens: "
        f"{name} is {figures[name]}, at most {bound}"
        for name, bound in pair_limits(figures).items()
        if figures[name] > bound
    ]


def measure(only: str) -> tuple[dict[str, Any], list[str], float]:
    """The report, its broken limits, and the worst ratio of a figure to its limit."""
    chosen = [case for case in cases() if re.search(only, case.name)]
    rows, broken, worst = [], [], 0.0
    for case in track(chosen, "counting", transient=True):
        counts = count(case)
        rows.append(counts)
        broken += broken_limits(case, counts)
        # A limit of 1 is the best there is, and launches are counted: neither says how much room is left.
        budgets = {name: bound for name, bound in case.limits.items() if bound > 1 and name != "launches"}
        worst = max([worst, *(counts[name] / bound for name, bound in budgets.items())])
    pairs = [figures for figures in all_pairs() if re.search(only, "attention pairs")]
    for figures in pairs:
        broken += pair_complaints(figures)
        worst = max([worst, *(figures[name] / bound for name, bound in pair_limits(figures).items())])
    return {"triton": triton_version(), "ops": rows, "attention_pairs": pairs}, broken, worst


def peers(path: Path) -> Figures:
    """Counted where they are installed; else what was counted before and stands in the file."""
    rows = [count(case) for case in counted_peers()]
    if not rows:
        print("not counted: Liger-Kernel is not installed (make bench-install); what was counted before is kept")
        before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        rows = [row for row in before.get("peers", []) if "requested" in row]
    return rows + [top_k_and_sort(tokens) for tokens in (2048, 32768)]


def show(report: dict[str, Any]) -> None:
    for row in report["ops"]:
        print(
            f"{row['op'] + ' ' + row['shape']:<72} launches {row['launches']}  unique {row['unique']:.3f}  "
            f"requested {row['requested']:.3f}"
        )
    for row in report["attention_pairs"]:
        name = f"attention pairs {row['target']} dim {row['head_dim']}, groups of {row['group']}, {row['tokens']:,}"
        print(f"{name:<72} executed {row['executed_over_needed']:.3f}  masked {row['masked_share']:.1%}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a limit is broken")
    parser.add_argument("--only", default="", metavar="REGEX", help="only cases whose name matches; writes nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    report, broken, worst = measure(options.only)
    show(report)
    if not options.check and not options.only:
        report["peers"] = peers(options.output)
        report["attention_peers"] = [row for tokens in TOKENS for row in attention_peers(tokens)]
        lines = {
            name: "\n" + ",\n".join(map(json.dumps, rows)) + "\n" for name, rows in report.items() if name != "triton"
        }
        body = ",\n".join(f"{json.dumps(name)}: [{rows}]" for name, rows in lines.items())
        options.output.write_text(f'{{"triton": {json.dumps(report["triton"])},\n{body}}}\n', encoding="utf-8")
        print(f"wrote {options.output}")
    for complaint in broken:
        print(f"broken: {complaint}")
    print(f"{len(broken)} broken limits; worst ratio to its limit: {worst:.3f}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
