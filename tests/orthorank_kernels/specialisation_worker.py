"""For which arguments Triton would compile each kernel anew: notes the keys of its cache, compiles nothing.

    python -m tests.orthorank_kernels.specialisation_worker sm_90

Runs in a process of its own, without the interpreter. One JSON object per call of an op on the standard output:
``{"call": ..., "sizes": ..., "keys": [[kernel, key], ...]}``.
"""

import json
import os
import sys
from unittest import mock

import torch

from tests.orthorank_kernels.every_op import Shapes, Sizes, calls
from tests.orthorank_kernels.fake_gpu import fake_gpus, noted_keys

# A model of ordinary sizes; what varies is what a serving stack varies from call to call.
MODEL = Sizes(hidden=4096, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
# Smaller ones leave a GPU idle sooner, so that keys are split for some lengths and not for others: each way by itself.
SMALL_MODELS = (
    Sizes(hidden=576, heads=9, kv_heads=3, head_dim=64, dtype=torch.bfloat16),
    Sizes(hidden=1024, heads=8, kv_heads=2, head_dim=128, dtype=torch.bfloat16),
)
SPLITS = (1, 4)
# Calls that the kernel for sm_90 takes.
HOPPER = (
    "sparse_query_attention",
    "sparse_query_attention, window, padding",
    "sparse_query_attention, cap, sinks, lse",
    "sparse_query_attention_varlen",
    "sparse_query_attention_paged",
)
ORDINARY = {
    "one prompt": {"batch": 1, "tokens": 2048, "selected": 682},
    "another length": {"batch": 1, "tokens": 1999, "selected": 682},
    "another k": {"batch": 1, "tokens": 2048, "selected": 512},
    "an odd k": {"batch": 1, "tokens": 2048, "selected": 511},
    "a batch": {"batch": 3, "tokens": 1777, "selected": 133},
    "a larger batch": {"batch": 16, "tokens": 1024, "selected": 48},
}
# Beyond them a launcher may choose another setting: for scores that no longer fit registers, for strides beyond 32
# bits, for so few queries that they leave most of a tile empty or the GPU idle.
EXTREME = {
    "one selected": {"batch": 2, "tokens": 1024, "selected": 1},
    "a few of many": {"batch": 1, "tokens": 8192, "selected": 100},
    "two tokens": {"batch": 2, "tokens": 2, "selected": 1},
    "8k": {"batch": 2, "tokens": 8191, "selected": 2730},
    "32k": {"batch": 1, "tokens": 32768, "selected": 10922},
    "a million": {"batch": 1, "tokens": 1_000_001, "selected": 333_333},
}


def main() -> None:
    from orthorank_kernels.triton import configs

    target = sys.argv[1]
    with fake_gpus(target, note=False), noted_keys(target) as keys:

        def note(
            model: Sizes, variations: dict[str, dict[str, int]], suffix: str = "", only: tuple[str, ...] = ()
        ) -> None:
            for sizes, changes in variations.items():
                for name, call in calls(Shapes("cuda:0"), model.with_(**changes)).items():
                    if only and name not in only:
                        continue
                    keys.clear()
                    call(backend="triton")
                    print(json.dumps({"call": name + suffix, "sizes": sizes, "keys": keys}), flush=True)

        note(MODEL, {**ORDINARY, **EXTREME})
        for model in SMALL_MODELS:
            for splits in SPLITS:
                with mock.patch.object(configs, "splits", lambda *_, splits=splits: splits):
                    note(model, ORDINARY, f"; {model.heads}/{model.kv_heads} heads, {splits} splits")
        if target == "sm_90":
            with mock.patch.dict(os.environ, ORTHORANK_ATTENTION="hopper"):
                note(MODEL, {**ORDINARY, **EXTREME}, "; hopper", HOPPER)


if __name__ == "__main__":
    main()
