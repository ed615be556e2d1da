"""The rows of the paper's Table 3, and what this package adds to them, as options of one plan."""

import dataclasses
import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

from orthorank import OrthoRankError, apply
from orthorank.evaluation import PerplexityResult, perplexity
from orthorank.plans import default_plan

DOCUMENTS = Path("c4") / "c4_sample.jsonl"
FULL = "full method"
# Name of the row: fields of the plan. The first three rows are one of the paper's, drawn three times.
ROWS: dict[str, dict[str, Any]] = {
    "random, seed 0": {"criterion": "random", "seed": 0},
    "random, seed 1": {"criterion": "random", "seed": 1},
    "random, seed 2": {"criterion": "random", "seed": 2},
    "inverse": {"criterion": "inverse"},
    "pre-norm states": {"criterion": "prenorm"},
    "K and V of selected tokens only": {"kv": "selected"},
    FULL: {},
    "cosine": {"criterion": "cosine"},
    "sink updated": {"update_sink": True},
    "further sinks last": {"sinks": "auto"},
    "inverse, further sinks last": {"criterion": "inverse", "sinks": "auto"},
}


def measure_table(model: Any, tokenizer: Any, documents: Path, window: int, windows: int) -> dict[str, Any]:
    """Perplexity of the model, dense and with each row's plan, on windows of joined documents; prints a line for each.

    Args:
        documents: JSON lines with a key ``text``; window, windows: tokens of a window, and how many are measured.
    """
    plan = default_plan(model, sparsity=0.2)
    text, sha256 = _read(documents)
    measured: dict[str, PerplexityResult] = {}

    def measure(name: str, options: dict[str, Any] | None) -> None:
        settings: dict[str, Any] = {"text": text, "tokenizer": tokenizer, "window": window, "windows": windows}
        if options is None:
            measured[name] = perplexity(model, **settings)
        else:
            with apply(model, dataclasses.replace(plan, **options)):
                measured[name] = perplexity(model, **settings)

    print(f"\n{windows} windows of {window} tokens of {documents.name}; layers {', '.join(map(str, plan.layers))} at")
    print(f"keep ratio {plan.keep_ratio:.4g}, chosen for the full method. Loss: against it, with its standard error")
    measure(FULL, {})
    measure("dense", None)
    print(f"\n{'':32}perplexity            loss")
    rows = {}
    for name in ("dense", *ROWS):
        if name not in measured:
            measure(name, ROWS[name])
        rows[name] = _row(measured[name], measured[FULL])
        print(
            f"{name:32}{rows[name]['perplexity']:10.2f} {rows[name]['loss']:+9.4f} +- {rows[name]['error']:.4f}",
            flush=True,
        )
    first = measured[FULL]
    return {
        "documents": documents.name,
        "documents_sha256": sha256,
        "ids_sha256": first.ids_sha256,
        "window": window,
        "windows": windows,
        "layers": plan.layers,
        "keep_ratio": plan.keep_ratio,
        "rows": rows,
    }


def _read(documents: Path) -> tuple[str, str]:
    """The documents joined by a space, and the sha256 of the file."""
    try:
        raw = documents.read_bytes()
    except OSError as error:
        raise OrthoRankError(
            f"the documents {documents} cannot be read: {error.strerror}; name the file with --documents"
        ) from error
    try:
        texts = [json.loads(line)["text"] for line in raw.splitlines()]
    except (ValueError, KeyError, TypeError) as error:
        raise OrthoRankError(f"{documents} does not hold JSON lines with a key 'text': {error!r}") from error
    return " ".join(texts), hashlib.sha256(raw).hexdigest()


def _row(result: PerplexityResult, full: PerplexityResult) -> dict[str, float]:
    """Perplexity, and the mean difference in nats from the full method with its standard error between windows."""
    differences = [a - b for a, b in zip(result.window_losses, full.window_losses, strict=True)]
    several = len(differences) > 1
    return {
        "perplexity": result.perplexity,
        "loss": statistics.fmean(differences),
        "error": statistics.stdev(differences) / math.sqrt(len(differences)) if several else math.nan,
    }
