"""Make the plans that come with the package: a greedy search on WikiText-2, for OrthoRank and for layer pruning.

    python benchmarks/make_default_plan.py [--sparsity 0.1] [--data ../shared/data] [--output orthorank/plans]

About 15 minutes on two cores. Calibration, the same tokens for both: the first three windows of 1,024 tokens of
``wikitext2/wiki.valid.tokens``; the plans' own figures: the first twelve windows of 1,024 tokens of
``wikitext2/wiki.test.raw``. The states of the searches are kept as their record; with one there, a search goes on.
"""

import argparse
import hashlib
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from orthorank import OrthoRankConfig, apply
from orthorank.common.files import write_text
from orthorank.config import SPARSITY
from orthorank.evaluation import flop_speedup, perplexity
from orthorank.models import load_model
from orthorank.plans import file_of
from orthorank.search import Evaluator, SearchState, candidate_layers, greedy_search, layer_count
from orthorank.search.settings import KEEP_RATIO
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import detect_sink

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "benchmarks" / "results" / "plans"
WINDOWS, SEQ_LEN, TEST_WINDOWS = 3, 1024, 12
JOINS = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}  # WikiText splits these; prose does not


def read_text(path: Path) -> str:
    """A file of WikiText-2 as it is."""
    if not path.is_file():
        sys.exit(f"{path} is not there; name the folder that holds wikitext2/ with --data")
    return path.read_text(encoding="utf-8")


def joined(text: str) -> str:
    """``text`` with its split hyphens and numbers joined: the calibration text is to be like prose."""
    for split, whole in JOINS.items():
        text = text.replace(split, whole)
    return text


def cut(text: str, tokenizer: Any, windows: int) -> torch.Tensor:
    """The first ``windows`` windows, int64 ``[windows, SEQ_LEN]``."""
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    return ids[: windows * SEQ_LEN].view(windows, SEQ_LEN)


def search(
    model: Any, ids: torch.Tensor, keep_ratio: float, candidates: list[int], count: int, saved: Path
) -> tuple[list[int], float]:
    """The layers and their calibration loss, with a line per round; goes on from the state in ``saved``."""
    begin = time.perf_counter()

    def on_evaluation(number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
        if layer == max(candidates) or done == total:
            spent = time.perf_counter() - begin
            print(f"  layer {number + 1} of {count}: loss {best:.4f} ({done} of {total}, {spent:.0f} s)", flush=True)

    state = greedy_search(
        Evaluator(LayerStack(model), ids, keep_ratio=keep_ratio),
        candidates,
        count,
        state=SearchState.load(saved) if saved.is_file() else None,
        on_evaluation=on_evaluation,
        save_to=saved,
    )
    print(f"  {state.plan} in {time.perf_counter() - begin:.0f} s", flush=True)
    return state.plan, state.losses[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder with wikitext2/")
    parser.add_argument("--sparsity", type=float, default=SPARSITY, help=f"nominal (default: {SPARSITY})")
    parser.add_argument("--output", type=Path, default=ROOT / "orthorank" / "plans")
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder for the states of the searches")
    arguments = parser.parse_args()
    arguments.records.mkdir(parents=True, exist_ok=True)
    calibration_text = joined(read_text(arguments.data / "wikitext2" / "wiki.valid.tokens"))
    test_text = read_text(arguments.data / "wikitext2" / "wiki.test.raw")

    model, tokenizer, _ = load_model(device="cpu", dtype="float32")
    calibration = cut(calibration_text, tokenizer, WINDOWS)
    test = cut(test_text, tokenizer, TEST_WINDOWS)
    sink = detect_sink(model, tokenizer)
    print(sink.reason)
    total = model.config.num_hidden_layers
    dense = perplexity(model, test)
    print(f"dense: perplexity {dense.perplexity:.2f}", flush=True)
    for method, keep_ratio, candidates in (
        ("orthorank", KEEP_RATIO, candidate_layers(sink)),
        ("layer-pruning", 0.0, list(range(1, total - 1))),  # SLEB's own range
    ):
        file = arguments.output / file_of("smollm2-135m-instruct", method, arguments.sparsity)
        count = layer_count(total, arguments.sparsity, keep_ratio)
        print(f"keep ratio {keep_ratio:.4g}, candidates {candidates[0]} to {candidates[-1]}", flush=True)
        layers, loss = search(model, calibration, keep_ratio, candidates, count, arguments.records / file.name)
        plan = OrthoRankConfig.for_model(model, layers=layers, keep_ratio=keep_ratio, sink_layer=sink.sink_layer)
        plan.calibration = {
            "text": "WikiText-2 validation (wiki.valid.tokens, split hyphens and numbers joined)",
            "text_sha256": hashlib.sha256(calibration_text.encode()).hexdigest(),
            "ids_sha256": hashlib.sha256(calibration.numpy().astype("<i8").tobytes()).hexdigest(),
            "tokens": calibration.numel(),
            "windows": WINDOWS,
            "seq_len": SEQ_LEN,
            "method": f"greedy search (SLEB) among layers {candidates[0]} to {candidates[-1]}",
            "loss": loss,
        }
        with apply(model, plan) if layers else nullcontext():
            result = perplexity(model, test)
        plan.measured = {
            "text": "WikiText-2 test (wiki.test.raw), first windows",
            "windows": TEST_WINDOWS,
            "seq_len": SEQ_LEN,
            "perplexity": round(result.perplexity, 3),
            "dense_perplexity": round(dense.perplexity, 3),
            "flop_speedup": round(flop_speedup(model.config, 2048, layers, keep_ratio), 4),
            "flop_speedup_tokens": 2048,
        }
        write_text(file, json.dumps(plan.to_dict(), indent=2, sort_keys=True) + "\n")
        print(f"perplexity {result.perplexity:.2f}; written to {file}", flush=True)


if __name__ == "__main__":
    main()
