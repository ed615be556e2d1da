"""What `warmup` leaves to compile: notes the keys of Triton's cache, compiles nothing.

    python -m tests.orthorank_kernels.warmup_worker sm_90

Runs in a process of its own, without the interpreter. One JSON object per kernel that a call of a model needed on the
standard output: ``{"layout": ..., "call": ..., "sizes": ..., "kernel": ..., "warm": true or false}``.
"""

import json
import sys
from typing import Any

from orthorank_kernels import warmup
from tests.orthorank_kernels.every_op import RANK, Call, Shapes, calls
from tests.orthorank_kernels.fake_gpu import fake_gpus, noted_keys
from tests.orthorank_kernels.specialisation_worker import EXTREME, MODEL, ORDINARY

PLAIN = ("gather_rows", "gather_add_rms_norm", "scatter_rows_", "scatter_add_rows_", "add_low_rank")
# Calls without options, by layout, and what `warmup` is told of one call with other values of them.
CALLS = {
    "batch": (
        *PLAIN,
        "rms_norm_score",
        "select_tokens",
        "rms_norm_select",
        "apply_rotary_at",
        "sparse_query_attention",
    ),
    "packed": (*(f"{name}, packed" for name in PLAIN), "sparse_query_attention_varlen"),
    "paged": ("apply_rotary_and_cache_", "sparse_query_attention_paged"),
}
OPTIONS = {"window": 77, "scale": 0.3, "softcap": 30.0}
OTHERS = {"window": 4096, "scale": 0.25, "softcap": 50.0}


def rotary(call: Call) -> dict[str, Any]:
    """What rotates attention's queries as a call of `apply_rotary_at` would."""
    return {"rotary_cos": call.args[1], "rotary_sin": call.args[2]}


def main() -> None:
    target = sys.argv[1]
    sizes = {"hidden": MODEL.hidden, "heads": MODEL.heads, "kv_heads": MODEL.kv_heads, "head_dim": MODEL.head_dim}
    with fake_gpus(target, note=False), noted_keys(target) as keys:
        for layout, names in CALLS.items():
            keys.clear()
            cache = calls(Shapes("cuda:0"), MODEL)["sparse_query_attention_paged"].args[1:3]
            model: dict[str, Any] = {"dtype": MODEL.dtype, **sizes, "rank": RANK, "layout": layout, "cache": cache}
            warmup(**model)
            warmup(**model, ops=names[-1:], options={names[-1]: OPTIONS})
            warm = set(keys)
            for at, changes in {**ORDINARY, **EXTREME}.items():
                found = calls(Shapes("cuda:0"), MODEL.with_(**changes))
                turned = [(names[-1], rotary(found["apply_rotary_at"]))] if layout == "batch" else []
                for name, options in (*((name, {}) for name in names), (names[-1], OTHERS), *turned):
                    keys.clear()
                    found[name](**options, backend="triton")
                    for kernel, key in keys:
                        row: dict[str, Any] = {"layout": layout, "call": name, "sizes": at, "kernel": kernel}
                        print(json.dumps({**row, "warm": (kernel, key) in warm}), flush=True)


if __name__ == "__main__":
    main()
