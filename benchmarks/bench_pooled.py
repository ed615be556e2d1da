"""How near a pooled state stays to the dense model's: the cosine of the last token's state, with it kept and without.

SmolLM2-135M-Instruct as an encoder, with both shipped plans, on the first 64 tokens of documents of C4. "kept" is what
`apply` does with a model that does not generate: the last token is always updated.

    python benchmarks/bench_pooled.py --json benchmarks/results/pooled_smollm2.json
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cosine_similarity

from orthorank import apply
from orthorank.common.files import write_json
from orthorank.models import load_model
from orthorank.plans import default_plan

DATA = Path(__file__).parents[2] / "shared" / "data" / "c4" / "c4_sample.jsonl"
TOKENS, SPARSITIES = 64, (0.1, 0.2)


def texts(file: Path, tokenizer: Any, count: int) -> torch.Tensor:
    """Ids ``[count, TOKENS]``, of documents that are long enough."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = tokenizer(json.loads(line)["text"], verbose=False)["input_ids"][:TOKENS]
        found += [ids] if len(ids) == TOKENS else []
        if len(found) == count:
            break
    return torch.tensor(found)


@torch.inference_mode()
def rows_of(model: Any, ids: torch.Tensor) -> list[dict[str, Any]]:
    """Of each plan the cosines to the dense state: their mean and the smallest."""
    encoder, rows = model.model, []
    dense = encoder(ids, use_cache=False)[0][:, -1]

    def cosines() -> dict[str, float]:
        found = cosine_similarity(encoder(ids, use_cache=False)[0][:, -1], dense).tolist()
        return {"mean": round(statistics.fmean(found), 4), "least": round(min(found), 4)}

    for sparsity in SPARSITIES:
        with apply(encoder, default_plan(model, sparsity=sparsity)) as handle:
            kept = cosines()
            with handle.prefilling(keep_last=0):
                rows.append({"sparsity": sparsity, "kept": kept, "not_forced": cosines()})
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL of documents, each with a text")
    parser.add_argument("--limit", type=int, default=64, help="documents (default: 64)")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if not options.data.is_file():
        print(f"bench_pooled: {options.data} is not there; name a file with --data", file=sys.stderr)
        return 2
    model, tokenizer, info = load_model(device="cpu", dtype="float32")
    ids = texts(options.data, tokenizer, options.limit)
    rows = rows_of(model, ids)
    for row in rows:
        print(f"{row['sparsity']:.0%}: kept {row['kept']}, not forced {row['not_forced']}")
    if options.json is not None:
        write_json(options.json, {"model": info.name, "texts": len(ids), "tokens": TOKENS, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
