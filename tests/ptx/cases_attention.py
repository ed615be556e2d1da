"""Calls of the three attention ops: see `cases`. Which of their settings and options occur, `test_coverage` knows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.ptx.case import FLOAT, HALF, HALF16, Case, ints, random, some_positions

GROUP = "attention"
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def late_positions(selected: int, tokens: int) -> Tensor:
    """[1, selected]: a few early ones, then a crowd at the end, so that a tile of queries sees whole blocks of keys."""
    generator = torch.Generator().manual_seed(selected)
    early = torch.randperm(60, generator=generator)[:5].sort().values
    late = tokens - 1 - torch.randperm(150, generator=generator)[: selected - 6].sort(descending=True).values
    return torch.cat([early, late, ints(-1)]).int()[None]


def batched(
    dtype: torch.dtype,
    dim: int,
    selected: int,
    keys: int,
    kv: int = 1,
    group: int = 4,
    fused: bool = False,
    slack: int = 0,
    **more: Any,
) -> dict[str, Any]:
    """``fused``: keys and values as slices of one projection; ``slack``: numbers between the rows of both."""
    q = random(1, selected, kv * group, dim, dtype=dtype).transpose(1, 2)
    k, v = (random(1, kv, keys, dim + slack, dtype=dtype, seed=s)[..., :dim] for s in (1, 2))
    if fused:
        k, v = (random(1, keys, 3, kv, dim, dtype=dtype)[:, :, i].transpose(1, 2) for i in (1, 2))
    if more.get("sinks"):
        more["sinks"] = random(kv * group, seed=5)
    return {"q": q, "k": k, "v": v, "positions": some_positions(1, selected, keys), **more}


def ragged_positions(selected: tuple[int, ...], keys: tuple[int, ...]) -> Tensor:
    """Packed, ascending in each sequence; each ends with its last key."""
    rows = [some_positions(1, s, n - 1, missing=0)[0, 1:] for s, n in zip(selected, keys, strict=True)]
    return torch.cat([torch.cat([row, ints(n - 1)]) for row, n in zip(rows, keys, strict=True)])


def cumulative(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *counts)).cumsum(0).int()


def packed(
    dtype: torch.dtype, selected: tuple[int, ...], keys: tuple[int, ...], dim: int = 64, **more: Any
) -> dict[str, Any]:
    return {
        "q": random(sum(selected), 4, dim, dtype=dtype),
        "k": random(sum(keys), 2, dim, dtype=dtype, seed=1),
        "v": random(sum(keys), 2, dim, dtype=dtype, seed=2),
        "positions": ragged_positions(selected, keys),
        "cu_selected": cumulative(selected),
        "cu_seqlens_k": cumulative(keys),
        **more,
    }


def paged(
    dtype: torch.dtype,
    page: int = 16,
    keys: tuple[int, ...] = (33, 70),
    dim: int = 64,
    float8: str = "",
    slack: int = 0,
    selected: tuple[int, ...] = (2, 5),
    kv: int = 2,
    **more: Any,
) -> dict[str, Any]:
    """Pages in any order. ``float8``: format of the cache; ``slack``: tokens between the pages of the values alone."""
    pages = [-(-n // page) for n in keys]
    k = random(sum(pages), page, kv, dim, dtype=dtype, seed=1)
    v = random(sum(pages), page + slack, kv, dim, dtype=dtype, seed=2)[:, :page]
    if float8:
        k, v = k.to(FLOAT8[float8]), v.to(FLOAT8[float8])
        more |= {"k_scale": torch.tensor([0.7]), "v_scale": torch.tensor([1.5, 0.3])}
    order = torch.randperm(sum(pages), generator=torch.Generator().manual_seed(3)).int()
    table = torch.zeros(len(keys), max(pages), dtype=torch.int32)
    for row, numbers in enumerate(order.split(pages)):
        table[row, : len(numbers)] = numbers
    return {
        "q": random(sum(selected), 4, dim, dtype=dtype),
        "k_cache": k,
        "v_cache": v,
        "positions": ragged_positions(selected, keys),
        "cu_selected": cumulative(selected),
        "block_table": table,
        "seq_lens": ints(*keys),
        **more,
    }


def case(
    op: str, name: str, dtype: torch.dtype, made: Callable[..., dict[str, Any]], slow: bool = True, **more: Any
) -> Case:
    """``more``: arguments of ``made``, and ``forced``."""
    forced = more.pop("forced", {})
    full = f"sparse_query_attention{op}"
    return Case(GROUP, full, name, dtype, lambda d: made(d, **more), slow, forced=forced)


def default_cases() -> Iterator[Case]:
    window = {"window": 50, "starts": ints(9)}
    sizes = {"dim": 64, "selected": 37, "keys": 560, "positions": late_positions(37, 560)}
    yield case("", "dim 64", HALF, batched, False, **sizes)
    tile = {"dim": 64, "selected": 4, "keys": 410, "positions": ints([390, 401, 409, -1])}
    yield case("", "dim 64, one tile", HALF, batched, False, **tile)
    yield case("", "dim 128, window and padding", HALF16, batched, False, dim=128, selected=9, keys=150, **window)
    yield case("", "dim 64", FLOAT, batched, dim=64, selected=5, keys=20, group=1)
    # The same kernels with longer loops.
    tile = {"dim": 64, "selected": 4, "keys": 1400, "positions": ints([1100, 1350, 1399, -1])}
    yield case("", "dim 64, one tile, more keys", HALF, batched, **tile)
    window = {"window": 400, "starts": ints(9)}
    name = "dim 128, window and padding, more keys"
    yield case("", name, HALF16, batched, dim=128, selected=9, keys=700, **window)


def tile_cases() -> Iterator[Case]:
    """Every head_dim, with few queries, more and many: each has settings of its own."""
    window = {"window": 50, "starts": ints(9)}
    for dim in (32, 64, 80, 96, 128, 192, 256):
        for dtype in (HALF, HALF16, FLOAT):
            for group, more in ((4, {"fused": True}), (1, {}), (7, window)):
                name = f"dim {dim}, groups of {group}" + "".join(f", {key}" for key in more)
                if group == 4 or dim in (64, 128) or (dim == 256 and group == 1):
                    yield case("", name, dtype, batched, dim=dim, selected=9, keys=150, group=group, **more)
    for dim in (64, 128, 256):
        for dtype in (HALF, HALF16, FLOAT):
            if (dim, dtype) != (64, HALF):
                yield case("", f"dim {dim}, many queries", dtype, batched, dim=dim, selected=37, keys=150)


def address_cases() -> Iterator[Case]:
    """How rows of keys are read: one number at a time where they are not aligned, by wide offsets where they must."""
    for dtype in (HALF, HALF16, FLOAT):
        yield case("", "rows that are not aligned", dtype, batched, dim=64, selected=5, keys=70, slack=3)
        wide = {"forced": {"INT32_MAX": 4000}}  # as many numbers as 31 bits count would take gigabytes
        yield case("", "wide offsets", dtype, batched, dim=64, selected=5, keys=70, slack=1, **wide)
        yield case("_paged", "wide offsets", dtype, paged, page=64, **wide)


def split_cases() -> Iterator[Case]:
    """Few queries over many keys: programs share the keys, and a second kernel joins what they leave."""
    every = {"window": 180, "softcap": 5.0, "sinks": True, "return_lse": True}
    few = {"selected": 3, "keys": 230, "group": 1}
    late = {"positions": ints([200, 228, 229])}  # all have keys, so that no logarithm is infinite
    yield case("", "split keys", FLOAT, batched, False, dim=64, **few)
    yield case("", "split keys, everything", FLOAT, batched, dim=128, **few, **late, **every)
    yield case("", "split keys, dim 256", FLOAT, batched, dim=256, **few)
    for dtype in (HALF, HALF16):
        for dim, keys in ((64, 1600), (128, 830), (256, 830)):
            name = f"split keys, dim {dim}"
            more = {"positions": ints([keys - 400, keys - 5, keys - 1]), "return_lse": dim == 128}
            yield case("", name, dtype, batched, dim=dim, selected=3, keys=keys, group=2, **more)
    long = {"keys": (6, 200), "max_seqlen_k": 200}
    for dtype in (FLOAT, HALF):
        size = long if dtype == FLOAT else {"keys": (6, 1600), "max_seqlen_k": 1600}
        yield case("_varlen", "split keys", dtype, packed, selected=(1, 2), **size, return_lse=True)
        yield case("_paged", "split keys", dtype, paged, **size)


def page_cases() -> Iterator[Case]:
    """Pages larger than a block of keys have code of their own; so have fp8 caches, and two that are laid out apart."""
    yield case("_paged", "e5m2", HALF, paged, False, float8="e5m2")
    many = {"keys": (500, *[3] * 257), "selected": (5, *[1] * 257), "max_seqlen_k": 500}
    yield case("_paged", "e5m2, 258 sequences", HALF, paged, float8="e5m2", **many)
    for dtype in (HALF, HALF16, FLOAT):
        if dtype != HALF:
            yield case("_paged", "e5m2", dtype, paged, float8="e5m2")
        yield case("_paged", "e4m3", dtype, paged, float8="e4m3", return_lse=True)
        for float8 in ("", "e4m3", "e5m2"):
            name = f"pages of 128, window{float8 and ', '}{float8}"
            yield case("_paged", name, dtype, paged, page=128, keys=(40, 300), window=150, float8=float8)
        yield case("_paged", "values further apart", dtype, paged, slack=1)


def rotary_cases() -> Iterator[Case]:
    """Queries that are rotated as they are read: whole heads and a part, halves and pairs."""
    for dtype in (HALF, HALF16, FLOAT):
        for part, interleaved in ((64, False), (40, True)):
            angles = random(150, part // 2, seed=6)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            more = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved, "rotary_dim": part}
            name = f"rotary, {part} turned" + (", interleaved" if interleaved else "")
            yield case("_varlen", name, dtype, packed, dtype != HALF, selected=(2, 5), keys=(33, 70), **more)


def attention_cases() -> Iterator[Case]:
    for made in (rotary_cases, default_cases, tile_cases, address_cases, split_cases, page_cases):
        yield from made()
