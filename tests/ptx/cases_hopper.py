"""Calls that the attention kernel for sm_90 takes: see `cases`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from tests.ptx.case import HALF, HALF16, Case, ints
from tests.ptx.cases_attention import GROUP, batched, packed, paged

# Of four heads a part of a tile has sixteen queries. The first part, with the later ones, sees two blocks whole; the
# second lets one block go unread, and has a mask in the others.
APART = (*range(100, 250, 40), *range(270, 382, 8))


def surrounded(dtype: torch.dtype, positions: Tensor, keys: int, starts: Tensor | None = None, **more: Any) -> Any:
    """Keys and values that no query sees are NaN, and so are the queries that stand nowhere."""
    made = batched(dtype, selected=positions.shape[1], keys=keys, positions=positions, starts=starts, **more)
    last = int(positions.max()) + more.get("query_offset", 0)
    for x in (made["k"], made["v"]):
        x[:, :, last + 1 :] = float("nan")
        if starts is not None:
            x[:, :, : int(starts)] = float("nan")
        if more.get("slack"):
            x._base[..., x.shape[3] :] = float("nan")
    made["q"].transpose(1, 2)[positions < 0] = float("nan")
    return made


def in_pages(
    dtype: torch.dtype,
    page: int,
    dim: int,
    keys: tuple[int, ...] = (40, 330),
    selected: tuple[int, ...] = (4, 64),
    window: int | None = None,
    most: int = 330,
    first: int = 200,
    **more: Any,
) -> Any:
    """Sequences in pages in any order. What no query sees is NaN: slots behind a sequence's last key and before its
    first window, and the page that a table names elsewhere, behind the last key by a number too large. ``first``:
    where the first query of the last sequence stands."""
    made = paged(dtype, page, keys, dim, selected=selected, slack=16, max_seqlen_k=most, **more)
    positions, table = made["positions"], made["block_table"]
    early, end = first + 2 * (selected[-1] - 24), first + 110
    positions[-selected[-1] :] = torch.cat([torch.arange(first, early, 2), torch.arange(end - 24, end)])
    nobody = made["k_cache"].shape[0]
    seen = [*((0, n) for n in keys[:-1]), (0 if window is None else first - window + 1, end)]
    wide = torch.full((len(keys), table.shape[1] + 9), nobody + 2**20, dtype=torch.int32)
    for row, (begin, _end) in enumerate(seen):
        own = -(-keys[row] // page)
        wide[row, :own] = table[row, :own]
        wide[row, : begin // page] = nobody
    for name in ("k_cache", "v_cache"):
        x = torch.nn.functional.pad(made[name], (0, 8, 0, 0, 0, 0, 0, 1), value=float("nan"))[..., :-8]
        for row, (begin, end) in enumerate(seen):
            for at in range(table.shape[1] * page):
                if at < -(-keys[row] // page) * page and not begin <= at < end:
                    x[table[row, at // page], at % page] = float("nan")
        made[name] = x
    if "table_rows" in more:
        wide = wide[more["table_rows"].long()]
    return {**made, "block_table": wide, "window": window}


def one(
    name: str, dtype: torch.dtype, slow: bool = True, op: str = "", made: Callable[..., Any] = surrounded, **more: Any
) -> Case:
    full, asked = f"sparse_query_attention{op}", {"ORTHORANK_ATTENTION": "hopper"}
    return Case(
        GROUP, full, f"hopper, {name}", dtype, lambda d: made(d, **more), slow, environment=asked, targets=("sm_90",)
    )


def hopper_cases() -> Iterator[Case]:
    padded = {"positions": ints((*APART, -1, -1)), "keys": 400, "starts": ints(9)}
    yield one("dim 64, padding", HALF, False, dim=64, **padded)
    for dtype in (HALF, HALF16):
        yield one("dim 128", dtype, dim=128, positions=ints(APART), keys=399, return_lse=True)
        # Seven heads: a row of each part is idle, and of two tiles the second is not full.
        sevens = ints(tuple(range(3, 377, 17)))
        yield one("dim 64, groups of 7", dtype, dim=64, positions=sevens, keys=390, group=7, kv=2, fused=True)
    for dtype in (HALF, HALF16):
        # As a cache of them has them: each number twice. Rows that stand nowhere have no angle.
        angles = torch.linspace(0, 99, 300 * 32).view(1, 300, 32).repeat(1, 1, 2)
        tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
        turned = {name: table.to(dtype) for name, table in tables.items()}
        late = ints((*range(100, 290, 11), -1, -1))
        yield one("dim 64, rotary", dtype, dim=64, positions=late, keys=300, **turned)
        yield one("dim 128, rotary", dtype, dim=128, positions=late, keys=300, **tables, rotary_dim=64)
        yield one(
            "dim 64, rotary, interleaved", dtype, dim=64, positions=late, keys=300, **turned, rotary_interleaved=True
        )
    # Windows: the first part lets blocks before its window go unread, and the others have a mask at either end.
    for dtype in (HALF, HALF16):
        wide = {"positions": ints((*range(280, 376, 6), *range(560, 624, 4))), "keys": 640, "window": 150}
        yield one("dim 64, window", dtype, dim=64, sinks=True, return_lse=True, **wide)
        yield one("dim 128, window", dtype, dim=128, softcap=5.0, starts=ints(200), **wide)
        yield one(
            "dim 128, sinks and soft-cap", dtype, dim=128, positions=ints(APART), keys=399, sinks=True, softcap=2.0
        )
    many = ints((*range(560, 576), *range(860, 876)))  # whole blocks between the masks of either end
    yield one("dim 64, window of 420", HALF, dim=64, positions=many, keys=890, window=420)
    yield one("dim 64, window of 1", HALF, dim=64, positions=ints((-1, *range(130, 460, 11))), keys=470, window=1)
    # The first kernel again with longer loops: both parts of a tile read the same blocks, or the second lets three go,
    # and the first has more than one with a mask behind the block that its own threads load.
    later, apart = ints(tuple(range(601, 637, 2))), ints((10, 13, 16, 400, 480, *range(740, 830, 6)))
    yield one("dim 64, many keys", HALF, dim=64, positions=later, keys=700, starts=ints(9), query_offset=50)
    yield one("dim 64, far apart", HALF, dim=64, positions=apart, keys=900, starts=ints(9))
    one_head = (*range(0, 390, 5), *(-1,) * 82)  # the last tile's queries stand nowhere, and half of the first's
    yield one("dim 128, one head", HALF, dim=128, positions=ints(one_head), keys=400, group=1)
    yield one("dim 64, groups of 71", HALF16, dim=64, positions=ints((5, 70, 130, 200, 300)), keys=301, group=71)
    # Blocks of 64 keys, and columns that threads load 64 at a time: one and a half of four are turned.
    angles = torch.linspace(0, 99, 300 * 48).view(1, 300, 48).repeat(1, 1, 2)
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_dim": 96}
    some = (*range(20, 100, 11), *range(102, 196, 6))
    yield one("dim 256, rotary", HALF, dim=256, positions=ints((*some, -1)), keys=200, starts=ints(9), **tables)
    tables |= {"rotary_interleaved": True}
    yield one("dim 256, rotary, interleaved", HALF16, dim=256, positions=ints((*some, -1)), keys=200, **tables)
    yield one("dim 256", HALF16, dim=256, positions=ints(some), keys=199, return_lse=True)
    wide = {"positions": ints((*range(140, 188, 6), *range(280, 316, 4))), "keys": 320, "window": 75}
    yield one("dim 256, window", HALF, dim=256, softcap=5.0, sinks=True, starts=ints(100), **wide)
    # Heads that zeros fill up: NaN stands between rows of K and V, and that of the last query behind the one before it.
    late = {"positions": ints((*range(100, 290, 11), -1)), "keys": 300}
    tables = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin()}
    yield one("dim 96, rotary", HALF, dim=96, slack=32, **late, **tables)
    yield one("dim 192", HALF16, dim=192, slack=64, **late, starts=ints(9))
    # One sequence has two tiles, and tiles between sequences have no query.
    lengths = {"selected": (70, 1, 3, 60), "keys": (140, 2, 40, 200)}
    for dtype in (HALF, HALF16):
        yield one("dim 64, packed", dtype, op="_varlen", made=packed, **lengths, return_lse=True)
    yield from paged_cases()
    yield from split_cases()


def paged_cases() -> Iterator[Case]:
    """Copies of 16 rows of a page each, of a whole page, and of a whole block; see `in_pages`."""
    wide = {"op": "_paged", "made": in_pages}
    # Four blocks, so that places of V are used again, in the loop and in the block with the first keys.
    few = {"keys": (630,), "most": 630, "selected": (32,), "kv": 1, "first": 500, "window": 299}
    yield one("pages of 16, window", HALF, False, page=16, dim=64, **few, **wide)
    yield one("pages of 16", HALF16, page=16, dim=64, return_lse=True, **wide)
    yield one("dim 128, pages of 32", HALF, page=32, dim=128, table_rows=ints(1, 0), **wide)
    yield one("dim 128, pages of 256, window", HALF16, page=256, dim=128, window=99, softcap=5.0, **wide)
    yield one("dim 256, pages of 64", HALF, page=64, dim=256, **wide)
    yield one("dim 96, pages of 16, window", HALF, page=16, dim=96, window=20, **wide)


def split_cases() -> Iterator[Case]:
    """Keys split over programs: rows that see nothing of a split, and splits of which no row sees anything."""
    apart = ints((*range(10, 30, 4), *range(285, 305)))
    every = {"sinks": True, "return_lse": True, "starts": ints(9)}
    # The second of two splits has three blocks, so that a place of V is used again.
    later = ints((*range(10, 30, 4), *range(585, 605)))
    yield one("dim 64, split keys", HALF, False, dim=64, positions=later, keys=1030, **every)
    yield one("dim 64, more splits than blocks", HALF16, dim=64, positions=apart[:, 1:], keys=2600, **every)
    late = ints((*range(700, 1000, 13), -1, -1))
    yield one("dim 128, split keys, window", HALF16, dim=128, positions=late, keys=1100, window=500, softcap=5.0)
    yield one("dim 256, split keys", HALF, dim=256, positions=late, keys=1100, query_offset=50, sinks=True)
    packs = {"selected": (60, 1, 43), "keys": (140, 2, 1100), "max_seqlen_k": 1100}
    yield one("dim 64, packed, split keys", HALF, op="_varlen", made=packed, **packs, return_lse=True)
    pages = {"keys": (1100,), "selected": (32,), "kv": 1, "most": 1100, "page": 16, "dim": 64, "window": 180}
    yield one("pages of 16, split keys, window", HALF, op="_paged", made=in_pages, **pages)
