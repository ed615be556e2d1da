"""Cases of the attention kernel."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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
        "sm_90": {"registers": 216, "spills": 0, "ntm": 490, "ntm_masked": 640},
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
        *rotary(keys, dim, layout.get("rotary", 0), bool(layout.get("interleaved"))),
    )


def rotary(tokens: int, dim: int, part: int, interleaved: bool) -> tuple[Any, ...]:
    """Tables of the first ``1 / part`` of a head's elements, and which of them are a pair; part 0: none."""
    if part == 0:
        return ()
    table = empty(1, tokens, dim // part)
    return table, table, interleaved, dim // part


class Pages(NamedTuple):
    """A paged cache: tokens of a page, its dtype, and whether heads are outside of pages and K and V side by side."""

    size: int
    dtype: torch.dtype = HALF
    heads_outside: bool = False


def packed_attention(
    dim: int, queries: int = 681, seqs: int = 5, pages: Pages | None = None, window: int | None = None
) -> Callable[[], Any]:
    """Queries of ragged sequences over packed keys, or over pages, with scales where these are fp8."""
    kv_heads, group, keys = 8, 4, 30_001
    q, positions = empty(queries, kv_heads * group, dim), empty(queries, dtype=torch.int32)
    ends = empty(seqs + 1, dtype=torch.int32)
    options = (dim**-0.5, window, None, None)
    if pages is None:
        k = empty(keys, kv_heads, dim)
        return launch("attention.sparse_query_attention_varlen", q, k, k, positions, ends, ends, None, *options, False)
    if pages.heads_outside:
        both = empty(999, kv_heads, pages.size, 2 * dim, dtype=pages.dtype).transpose(1, 2)
        k, v = both.split(dim, -1)
    else:
        k = v = empty(999, pages.size, kv_heads, dim, dtype=pages.dtype)
    scale = empty(1, dtype=FLOAT) if pages.dtype != HALF else None
    table = empty(seqs, keys // pages.size, dtype=torch.int32)
    return launch(
        "attention.sparse_query_attention_paged", q, k, v, positions, ends, table, empty(seqs, dtype=torch.int32),
        None, None, *options, scale, scale, False,
    )  # fmt: skip


def at_most(factor: float, dim: int) -> dict[str, dict[str, float | None]]:
    """So many times the instructions of the gated cases' unmasked loop."""
    return {target: {"ntm": factor * limits["ntm"]} for target, limits in ATTENTION[dim].items()}


def packed_cases() -> Iterator[Case]:
    """Packed and paged keys, and few queries: more instructions than the gated cases only where a comment says so."""
    quiet = {"atomics": 0, "hot_spills": 0}
    for dim in (64, 128):
        slow = dim == 64
        yield Case("attention", f"dim {dim}, packed", packed_attention(dim), quiet, at_most(1.0, dim), slow=slow)
        window = packed_attention(dim, window=1000)
        yield Case("attention", f"dim {dim}, packed, window", window, quiet, at_most(1.15, dim), slow=True)
        for size, outside in ((1, False), (16, False), (16, True), (24, False), (64, False), (128, False), (256, True)):
            # A pointer for each row, where batch and packed keys on sm_90 have one descriptor for the block; a page of
            # another size than a power of two takes a division.
            factor = 1.3 if size == 24 else 1.2 if size in (1, 16) else 1.15
            name = f"dim {dim}, pages of {size}{', heads outside' if outside else ''}"
            launched = packed_attention(dim, pages=Pages(size, heads_outside=outside))
            first = dim == 128 and size == 16 and not outside
            yield Case("attention", name, launched, quiet, at_most(factor, dim), slow=not first)
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            # Two numbers of K and V are converted for each score with 128 rows and head_dim 128; on sm_80 by each warp
            # for itself, on sm_90 once, through shared memory.
            factor = 1.6 if dtype == torch.float8_e4m3fn else 1.25
            at = {"sm_90": {"ntm": factor * ATTENTION[dim]["sm_90"]["ntm"]}}
            launched = packed_attention(dim, pages=Pages(16, dtype))
            yield Case("attention", f"dim {dim}, pages of 16, {name_of(dtype)}", launched, quiet, at, slow=True)
        for queries in (4, 64):  # of four sequences: tiles of 16 and of 64 rows, keys split, and a second launch
            limits = {**quiet, "launches": 2}
            few = packed_attention(dim, queries, 4)
            yield Case("attention", f"dim {dim}, {queries} queries, packed", few, limits, slow=True)
            few = packed_attention(dim, queries, 4, Pages(16))
            first = dim == 128 and queries == 4
            yield Case("attention", f"dim {dim}, {queries} queries, pages of 16", few, limits, slow=not first)
        # Whole tiles whose keys are split: the end of a prompt, or what a threshold leaves of a long one.
        for name, pages, factor in (("packed", None, 1.15), ("pages of 16", Pages(16), 1.35)):
            some = packed_attention(dim, 100, 1, pages)
            limits = {**quiet, "launches": 2}
            yield Case("attention", f"dim {dim}, 100 queries, {name}", some, limits, at_most(factor, dim), slow=True)
    for dim in (96, 256):
        for queries in (4, 64):
            few = packed_attention(dim, queries, 4)
            yield Case("attention", f"dim {dim}, {queries} queries, packed", few, {**quiet, "launches": 2}, slow=True)


def few_queries(dim: int, queries: int, keys: int, dtype: torch.dtype) -> Callable[[], Any]:
    """A batch of one; with many keys these are split."""
    q = empty(1, queries, 8, dim, dtype=dtype).transpose(1, 2)
    k = empty(1, 2, keys, dim, dtype=dtype)
    options = (dim**-0.5, None, None, 0, None, None, False)
    return launch("attention.sparse_query_attention", q, k, k, some_positions(1, queries), *options)


FEW_KEYS, MANY_KEYS = 120, 30_000


def tiles_of_few_rows() -> Iterator[Case]:
    """The settings that no other case has: of few queries, and of float32 or head_dim 256 where keys are split."""
    for dim, dtype in ((d, t) for d in (64, 128, 256) for t in (HALF, FLOAT)):
        wanted = [(2, FEW_KEYS), (16, FEW_KEYS)]
        wanted += [(2, MANY_KEYS), (16, MANY_KEYS)] if dtype == FLOAT else []
        wanted += [(100, MANY_KEYS)] if dtype == FLOAT or dim == 256 else []
        for queries, keys in wanted:
            limits = {"atomics": 0, "launches": 2 if keys == MANY_KEYS else 1}
            limits |= {"hot_spills": 0} if dtype == HALF else {}
            name = f"dim {dim}, {queries} queries of {keys:,}, {name_of(dtype)}"
            yield Case("attention", name, few_queries(dim, queries, keys, dtype), limits, slow=True)


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
                    at = {"sm_80": {"spills": 15}} if dtype == FLOAT and dim in (80, 96, 128) else {}
                    at |= {"sm_100": {"spills": 4}} if dtype == FLOAT and dim == 32 else {}
                    # As many heads as keep the keys of a tile in one program.
                    launched = attention(dim, group, dtype, kv_heads=16 if group == 1 else 8)
                    yield Case("attention", name, launched, limits, at, slow=True)
    for dim in (64, 128):
        for name, options in {
            "window": {"window": 1000},
            "padding": {"padded": True},
            "window and padding": {"window": 1000, "padded": True},
            "groups of 7": {"group": 7},
            "groups of 71": {"group": 71, "kv_heads": 1},
            "fused layout": {"fused": 1},
            "64-bit rows": {"keys": 2**26, "kv_heads": 1, "fused": 1},
            "sinks": {"sinks": 1},
            "log-sum-exp": {"lse": 1},
            "soft-capping": {"softcap": 50},
            "rotary": {"rotary": 1},
            "rotary, a quarter": {"rotary": 4},
            "rotary, interleaved": {"rotary": 1, "interleaved": 1},
        }.items():
            # The hyperbolic tangent is an exponential and a reciprocal more for each score.
            at = at_most(1.65 if "softcap" in options else 1.15, dim)
            # One head and so many keys leave most of a GPU idle: they are split.
            limits = quiet | ({"launches": 2} if name == "64-bit rows" else {})
            yield Case("attention", f"dim {dim}, {name}", attention(dim, **options), limits, at, slow=True)
    yield from packed_cases()
    yield from tiles_of_few_rows()
