"""Perplexity of the shipped 20 % plans on the demo's held-out text, as ``orthorank demo --sparsity 0.2`` measures it.

    python benchmarks/bench_shipped.py --json benchmarks/results/shipped_smollm2.json

Nothing is timed. Beside the perplexities stands log(OrthoRank / layer pruning) with its standard error, from the
differences in each window: whether the two can be told apart on so much text.
"""

import argparse
import math
import statistics
from contextlib import nullcontext
from pathlib import Path

import orthorank
from orthorank.common.environment import environment
from orthorank.common.files import write_json
from orthorank.common.texts import find_text, take_samples, tokenize
from orthorank.demo.settings import Settings
from orthorank.evaluation import perplexity
from orthorank.models import load_model
from orthorank.plans import default_plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()

    model, tokenizer, info = load_model(device="cpu", dtype="float32")
    text, settings = find_text(), Settings(output=Path())
    samples = take_samples(
        tokenize(text, tokenizer),
        windows=settings.windows,
        window=settings.window,
        held_out_windows=settings.held_out_windows,
        held_out_len=settings.held_out_len,
    )
    plans = {
        "dense": None,
        "layer pruning": default_plan(model, "layer-pruning", 0.2),
        "orthorank": default_plan(model, sparsity=0.2),
    }
    losses: dict[str, tuple[float, ...]] = {}
    rows = []
    for name, plan in plans.items():
        with nullcontext() if plan is None else orthorank.apply(model, plan):
            found = perplexity(model, samples.held_out)
        losses[name] = found.window_losses
        layers = [] if plan is None else plan.layers
        rows.append({"name": name, "layers": layers, "perplexity": found.perplexity, "window_losses": losses[name]})
        print(f"{name:14} {found.perplexity:.2f}", flush=True)
    differences = [a - b for a, b in zip(losses["orthorank"], losses["layer pruning"], strict=True)]
    ratio = {
        "mean": statistics.mean(differences),
        "standard_error": statistics.stdev(differences) / math.sqrt(len(differences)),
    }
    print(f"log(orthorank / layer pruning): {ratio['mean']:.3f} ± {ratio['standard_error']:.3f}")
    if options.json is not None:
        about = {"model": info.to_dict(), "text": text.name, "text_sha256": text.sha256}
        windows = {"windows": len(samples.held_out), "seq_len": samples.held_out.shape[1]}
        write_json(
            options.json, about | windows | {"rows": rows, "log_ratio": ratio, "environment": environment().to_dict()}
        )


if __name__ == "__main__":
    main()
