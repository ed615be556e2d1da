"""Cases of the attention kernel."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.static.case import FLOAT, HALF, Case, empty, launch, name_of, some_positions

# ntm of the unmasked and of the masked loop: see `worker`. Beyond 977 on an H100 and 1953 on an A100, issuing
# instructions takes longer than the matrix products. By head_dim.
ATTENTION = {
    64: {
        "sm_80": {"registers": 248, "spills": 0, "ntm": 870, "ntm_masked": 1180},
        "sm_90": {"registers": 184, "spills": 0, "ntm": 890, "ntm_masked": 1190},
    },
    128: {
        "sm_80": {"registers": 216, "spills": 0, "ntm": 680, "ntm_masked": 830},
        # Measured 642 with the mask that compares keys; the one that compares columns gives 614, and 254 registers.
        "sm_90": {"registers": 216, "spills": 0, "ntm": 490, "ntm_masked": 645},
    },
}
NO_SPILLS = {"sm_100": {"spills": 0}, "gfx942": {"spills": 0}}


def attention(
    dim: int, group: int = 4, dtype: torch.dtype = HALF, window: int | None = None, padded: bool = False, **layout: int
) -> Callable[[], Any]:
    """Query rows as a projection leaves them, keys and values as a cache holds them; a ragged number of each."""
    kv_heads, keys = layout.get("kv_heads", 8), layout.get("keys", 2047)
    q = empty(2, 681, kv_heads * group, dim, dtype=dtype).transpose(1, 2)
    k = empty(2, kv_heads, keys, dim, dtype=dtype)
    if layout.get("fused"):  # keys and values as slices of one projection: rows are far apart
        k = empty(2, keys, 3, kv_heads, dim, dtype=dtype)[:, :, 1].transpose(1, 2)
    starts = empty(2, dtype=torch.int32) if padded else None
    return launch(
        "attention.sparse_query_attention",
        q,
        k,
        k,
        some_positions(2, 681),
        dim**-0.5,
        window,
        starts,
        keys - 681,
        layout.get("softcap"),
        empty(kv_heads * group) if layout.get("sinks") else None,
        bool(layout.get("lse")),
    )


def attention_cases() -> Iterator[Case]:
    wide = {"atomics": 0, "min_wide_loads": 0.95, "min_wide_stores": 1.0}
    for dim, at in ATTENTION.items():
        yield Case("attention", f"dim {dim}, groups of 4", attention(dim), wide, {**NO_SPILLS, **at})
    quiet = {"atomics": 0, "hot_spills": 0}
    for dim in (32, 64, 80, 96, 128, 192, 256):
        for dtype in (HALF, torch.float16, FLOAT):
            for group in (1, 4):
                if (dim, dtype, group) not in ((64, HALF, 4), (128, HALF, 4)):
                    # Float32 has no matrix instructions to find its loops by: all its spills count.
                    limits = {"atomics": 0, "spills": 10 if dim == 64 else 0} if dtype == FLOAT else quiet
                    name = f"dim {dim}, groups of {group}, {name_of(dtype)}"
                    yield Case("attention", name, attention(dim, group, dtype), limits, slow=True)
    for dim in (64, 128):
        for name, options in {
            "window": {"window": 1000},
            "padding": {"padded": True},
            "window and padding": {"window": 1000, "padded": True},
            "groups of 7": {"group": 7},
            "groups of 71": {"group": 71, "kv_heads": 1},
            "fused layout": {"fused": 1},
            "64-bit rows": {"keys": 2**26, "kv_heads": 1, "fused": 1},
        }.items():
            at = {target: {"ntm": 1.15 * limits["ntm"]} for target, limits in ATTENTION[dim].items()}
            yield Case("attention", f"dim {dim}, {name}", attention(dim, **options), quiet, at, slow=True)
