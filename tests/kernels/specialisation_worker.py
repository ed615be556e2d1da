"""For which arguments Triton would compile each kernel anew: notes the keys of its cache, compiles nothing.

    python -m tests.kernels.specialisation_worker sm_90

Runs in a process of its own, without the interpreter. One JSON object per call of an op on the standard output:
``{"call": ..., "sizes": ..., "keys": [[kernel, key], ...]}``.
"""

import json
import sys

import torch

from tests.kernels.every_op import Shapes, Sizes, calls
from tests.kernels.fake_gpu import fake_gpus, noted_keys

# A model of ordinary sizes; what varies is what a serving stack varies from call to call.
MODEL = Sizes(hidden=4096, heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16)
ORDINARY = {
    "one prompt": {"batch": 1, "tokens": 2048, "selected": 682},
    "another length": {"batch": 1, "tokens": 1999, "selected": 682},
    "another k": {"batch": 1, "tokens": 2048, "selected": 512},
    "an odd k": {"batch": 1, "tokens": 2048, "selected": 511},
    "a batch": {"batch": 3, "tokens": 1777, "selected": 33},
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
    target = sys.argv[1]
    with fake_gpus(target, note=False), noted_keys(target) as keys:
        for sizes, changes in {**ORDINARY, **EXTREME}.items():
            for name, call in calls(Shapes("cuda:0"), MODEL.with_(**changes)).items():
                keys.clear()
                call(backend="triton")
                print(json.dumps({"call": name, "sizes": sizes, "keys": keys}), flush=True)


if __name__ == "__main__":
    main()
