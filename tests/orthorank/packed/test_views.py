"""`orthorank.packed.views`: attention over the caches of vLLM and SGLang where they lie, against dense."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from orthorank import OrthoRankError
from orthorank.packed import views
from orthorank_kernels import sparse_query_attention_paged

BLOCKS, SIZE, HEADS, DIM, QUERY_HEADS = 9, 16, 2, 32, 6
LENGTHS, SELECTED = (37, 0, 70), ([0, 5, 16, 36], [], [3, 63, 64, 69])
Views = tuple[Tensor, Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


class Case(NamedTuple):
    """Keys and values of each request ``[tokens, kv_heads, head_dim]``, and the pages they lie in."""

    keys: list[Tensor]
    values: list[Tensor]
    pages: list[list[int]]
    queries: Tensor

    def paged(self, of: list[Tensor], fill: float = float("nan")) -> Tensor:
        """``[blocks, block_size, kv_heads, head_dim]`` with the requests' tokens in their pages."""
        memory = torch.full((BLOCKS, SIZE, HEADS, DIM), fill)
        for tokens, pages in zip(of, self.pages, strict=True):
            for place, token in enumerate(tokens):
                memory[pages[place // SIZE], place % SIZE] = token
        return memory


def case() -> Case:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    keys, values = ([random(n, HEADS, DIM) for n in LENGTHS] for _ in range(2))
    return Case(keys, values, [[7, 2, 0], [], [4, 8, 1, 5, 3]], random(sum(map(len, SELECTED)), QUERY_HEADS, DIM))


def dense(given: Case, cast: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Every query attends to all earlier tokens of its request."""
    out, at = [], 0
    for keys, values, selected in zip(given.keys, given.values, SELECTED, strict=True):
        for position in selected:
            seen = slice(0, position + 1)
            k, v = (cast(x[seen]).double().transpose(0, 1) for x in (keys, values))
            query = given.queries[at].double()[:, None]
            out.append(scaled_dot_product_attention(query, k, v, enable_gqa=True)[:, 0])
            at += 1
    return torch.stack(out).float()


def attention(given: Case, keys: Tensor, values: Tensor, table: Tensor | None = None, **options: Any) -> Tensor:
    if table is None:
        table = torch.full((len(LENGTHS), 6), 2**31 - 1, dtype=torch.int32)
        for row, pages in enumerate(given.pages):
            table[row, : len(pages)] = torch.tensor(pages)
    return sparse_query_attention_paged(
        given.queries,
        keys,
        values,
        torch.tensor([position for request in SELECTED for position in request]).int(),
        torch.tensor([0, *map(len, SELECTED)]).cumsum(0).int(),
        table,
        torch.tensor(LENGTHS).int(),
        **options,
    )


def within(memory: Tensor, others: int, axis: int) -> Tensor:
    """``memory`` as one of several along a new ``axis``: other layers in the same allocation."""
    return (
        torch.stack([torch.full_like(memory, float("nan"))] * others, axis)
        .index_copy_(axis, torch.tensor([1]), memory.unsqueeze(axis))
        .select(axis, 1)
    )


def heads_outer(joint: Tensor) -> Tensor:
    return joint.permute(2, 0, 1, 3).contiguous().transpose(0, 1)


# From keys and values in pages ``[blocks, block_size, kv_heads, head_dim]``: the cache as the stack allocates it, with
# the axes that its code names. A letter is a dimension of memory, outermost first: layer, block, head, token (N).
JOINT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "LBHNC": lambda k, v: torch.cat([k, v], -1).transpose(1, 2).contiguous(),
    "LBNHC": lambda k, v: torch.cat([k, v], -1).transpose(1, 2),
    "BLHNC": lambda k, v: within(torch.cat([k, v], -1).transpose(1, 2).contiguous(), 3, 1),
    "BLNHC": lambda k, v: within(torch.cat([k, v], -1), 3, 1).transpose(1, 2),
    "LHBNC": lambda k, v: heads_outer(torch.cat([k, v], -1)),
}


def assert_where_it_was(cache: Tensor, *found: Tensor) -> None:
    for view in found:
        assert view.untyped_storage().data_ptr() == cache.untyped_storage().data_ptr()
        assert view.shape == (BLOCKS, SIZE, HEADS, DIM)
        assert view.stride(-1) == 1


@pytest.mark.parametrize("layout", JOINT)
def test_vllm(layout: str) -> None:
    given = case()
    cache = JOINT[layout](given.paged(given.keys), given.paged(given.values))
    assert cache.shape == (BLOCKS, HEADS, SIZE, 2 * DIM)
    keys, values = views.split_last(cache, DIM)
    assert_where_it_was(cache, keys, values)
    torch.testing.assert_close(attention(given, keys, values), dense(given), rtol=1e-5, atol=1e-5)


def test_the_layouts_differ_in_memory() -> None:
    """Of keys alike, no two have the same strides."""
    pages = torch.zeros(BLOCKS, SIZE, HEADS, DIM)
    found = [views.split_last(make(pages, pages), DIM)[0].stride() for make in JOINT.values()]
    assert len(set(found)) == len(JOINT)


@pytest.mark.parametrize(("name", "dtype"), [("fp8", E4M3), ("fp8_e4m3", E4M3), ("fp8_e5m2", E5M2)])
@pytest.mark.parametrize("layout", JOINT)
def test_bytes_of_an_8_bit_cache(layout: str, name: str, dtype: torch.dtype) -> None:
    """vLLM allocates them as uint8; the scales are tensors without dimensions."""
    given = case()
    raw = [given.paged(of, fill=0.0).to(dtype).view(torch.uint8) for of in (given.keys, given.values)]
    make = JOINT[layout]
    if layout.startswith("BL"):
        wide = [x.float() for x in raw]  # `within` pads with NaN
        cache = make(*wide).nan_to_num(255).to(torch.uint8)
    else:
        cache = make(*raw)
    kind = views.FP8[name]
    keys, values = views.split_last(cache, DIM, kind)
    assert_where_it_was(cache, keys, values)
    assert keys.dtype == values.dtype == dtype
    scales = {"k_scale": torch.tensor(0.5), "v_scale": torch.tensor(3.0)}
    halved = given._replace(queries=given.queries * 0.5)
    expected = dense(halved, lambda x: x.to(dtype).float()) * 3
    torch.testing.assert_close(attention(given, keys, values, **scales), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_sglang(page_size: int) -> None:
    """One buffer of slots for keys and one for values, and a page of padding more than the pool has."""
    given = case()
    buffers = [given.paged(of).flatten(0, 1) for of in (given.keys, given.values)]
    keys, values = views.pages_of_slots(*buffers, page_size)
    for view, buffer in zip((keys, values), buffers, strict=True):
        assert view.data_ptr() == buffer.data_ptr()
        assert view.shape == (BLOCKS * SIZE // page_size, page_size, HEADS, DIM)
    pages = SIZE // page_size  # of ours in one of the case's
    table = torch.full((len(LENGTHS), 6 * pages), -1, dtype=torch.int32)
    for row, blocks in enumerate(given.pages):
        numbers = [block * pages + i for block in blocks for i in range(pages)]
        table[row, : len(numbers)] = torch.tensor(numbers)
    torch.testing.assert_close(attention(given, keys, values, table), dense(given), rtol=1e-5, atol=1e-5)


def test_sglang_pages_of_one_through_its_own_table() -> None:
    """``req_to_token`` has a row for each request that may be alive; ``req_pool_indices`` says which."""
    given = case()
    keys, values = views.pages_of_slots(*(given.paged(x).flatten(0, 1) for x in (given.keys, given.values)), 1)
    req_to_token = torch.full((12, 100), -(2**31), dtype=torch.int32)
    rows = torch.tensor([8, 0, 5], dtype=torch.int32)
    for row, length, blocks in zip(rows.tolist(), LENGTHS, given.pages, strict=True):
        slots = [block * SIZE + i for block in blocks for i in range(SIZE)][:length]
        req_to_token[row, :length] = torch.tensor(slots, dtype=torch.int32)
    out = attention(given, keys, values, req_to_token, table_rows=rows)
    torch.testing.assert_close(out, dense(given), rtol=1e-5, atol=1e-5)


def test_sglang_with_heads_before_tokens() -> None:
    """Its other layout is one transposition away, and needs no help."""
    given = case()
    keys, values = (given.paged(x).transpose(1, 2).contiguous().transpose(1, 2) for x in (given.keys, given.values))
    torch.testing.assert_close(attention(given, keys, values), dense(given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "fp8", "words"),
    [
        ((9, 2, 16, 64), None, r"\[9, 2, 16, 64\]; with 64 channels a head it must be .*128\]"),
        ((9, 2, 16, 130), None, r"\[9, 2, 16, 130\]"),  # scales behind the values
        ((2, 9, 16, 2, 128), None, r"\[2, 9, 16, 2, 128\]"),
        ((9, 2, 128), None, r"\[9, 2, 128\]"),
        ((9, 2, 16, 128), E4M3, "dtype float32; an 8-bit cache has one of 8 bits"),
    ],
)
def test_split_last_refuses(shape: tuple[int, ...], fp8: torch.dtype | None, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        views.split_last(torch.zeros(shape), 64, fp8)


@pytest.mark.parametrize(
    ("keys", "values", "page_size", "words"),
    [
        ((64, 2, 8), (64, 2, 8), 24, "page_size is 24; it must divide the 64 slots"),
        ((64, 2, 8), (64, 2, 8), 0, "page_size is 0"),
        ((64, 16), (64, 16), 16, r"keys has shape \[64, 16\]; it must be \[slots, kv_heads, head_dim\]"),
        ((64, 2, 8), (48, 2, 8), 16, r"values has shape \[48, 2, 8\]; it must be that of keys, \[64, 2, 8\]"),
    ],
)
def test_pages_of_slots_refuses(keys: tuple[int, ...], values: tuple[int, ...], page_size: int, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        views.pages_of_slots(torch.zeros(keys), torch.zeros(values), page_size)


def test_an_empty_pool_has_no_pages() -> None:
    slots = torch.zeros(0, 2, 8)
    assert views.pages_of_slots(slots, slots, 16)[0].shape == (0, 16, 2, 8)
