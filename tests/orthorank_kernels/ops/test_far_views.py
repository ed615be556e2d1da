"""Views whose elements lie more than 2^31 apart, in Triton's interpreter, which counts a loop in Python's ints.

A compiled kernel is right there, since the bounds of the loop are 64 bits wide; the interpreter took the number for 32
bits and the address for another one. Every argument of every op that has an offset is tried.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import orthorank_kernels as ok
from orthorank_kernels.dispatch import interpreting
from tests.orthorank_kernels.every_op import flat

pytestmark = pytest.mark.skipif(not interpreting(), reason="of Triton's interpreter")
FAR, ROWS, WIDTH = 2**30 + 64, 4, 8  # one row's offset fits in 32 bits, that of the last of four does not


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def far_rows(dtype: torch.dtype) -> Tensor:
    """[ROWS, WIDTH], rows FAR elements apart; of the memory between, nothing is touched."""
    try:
        storage = torch.empty(FAR * (ROWS - 1) + WIDTH, dtype=dtype)
    except RuntimeError:
        pytest.skip(f"no address space for {FAR * ROWS * dtype.itemsize >> 30} GiB")
    return storage.as_strided((ROWS, WIDTH), (FAR, 1)).copy_(random(ROWS, WIDTH).to(dtype))


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


ONES, LAST, ALL = torch.ones(WIDTH).half(), ints(3)[None], ints(0, 1, 2, 3)[None]
TABLE = torch.ones(1, 1, WIDTH)


def scattered(op: Any, x: Tensor, *args: Tensor, **options: Any) -> Tensor:
    op(x, *args, **options)
    return x.clone()


def cached(**given: Tensor | dict[str, Any]) -> list[Tensor]:
    """Keys and values of all tokens to the last slots of caches, of which the far one is given, or what is written."""
    heads = max(x.shape[-2] for n, x in given.items() if n in ("k_cache", "v_cache", "keys", "values"))
    shape = next((x.shape for n, x in given.items() if "cache" in n), (4, 1, heads, WIDTH))
    tokens = next((x.shape[0] for n, x in given.items() if n in ("keys", "values")), 1)
    rows = {"keys": random(tokens, heads, WIDTH, seed=1), "values": random(tokens, heads, WIDTH, seed=2)}
    caches = {name: torch.zeros(shape).half() for name in ("k_cache", "v_cache")}
    slots = shape[0] * shape[1] - 1 - torch.arange(tokens)
    of = {
        **caches,
        **rows,
        "slots": slots,
        "cos": TABLE[0].expand(tokens, -1),
        "sin": TABLE[0].expand(tokens, -1),
    } | given
    ok.apply_rotary_and_cache_(**of)
    return [of["k_cache"].clone(), of["v_cache"].clone()]


def paged(x: Tensor, cache: Tensor, last: int, table: Tensor, heads: int = 1, **options: Any) -> Tensor:
    q, lens = random(1, heads, WIDTH, seed=1), ints(last + 1)
    return ok.sparse_query_attention_paged(q, cache, cache, ints(last), ints(0, 1), table, lens, **options)


def varlen(q: Tensor, k: Tensor, positions: Tensor, **options: Any) -> Tensor:
    ends = ints(0, q.shape[0]), ints(0, k.shape[0])
    return ok.sparse_query_attention_varlen(q, k, k, positions, *ends, **options)


# What lies far apart: the call, with x [ROWS, WIDTH].
CALLS: dict[str, Callable[..., Any]] = {
    "rms_norm_score: tokens": lambda x, **o: ok.rms_norm_score(x[None], ONES, 1e-6, **o),
    "rms_norm_score: rows of the batch": lambda x, **o: ok.rms_norm_score(x[:, None], ONES, 1e-6, **o),
    "rms_norm_score: packed": lambda x, **o: ok.rms_norm_score(x, ONES, 1e-6, cu_seqlens=ints(0, 1, 4), **o),
    "rms_norm_score: the sink's own token": lambda x, **o: ok.rms_norm_score(x[None], ONES, 1e-6, starts=ints(3), **o),
    "rms_norm_score: residual": lambda x, **o: ok.rms_norm_score(
        random(1, 4, 8, seed=1), ONES, 1e-6, residual=x[None], **o
    ),
    "rms_norm_score: stored sinks": lambda x, **o: ok.rms_norm_score(random(4, 1, 8, seed=1), ONES, 1e-6, sink=x, **o),
    "rms_norm_select: tokens": lambda x, **o: ok.rms_norm_select(x[None], ONES, 1e-6, 2, **o),
    "rms_norm_select: packed, residual": lambda x, **o: ok.rms_norm_select(
        random(4, 8, seed=1), ONES, 1e-6, ints(1, 2), residual=x, cu_seqlens=ints(0, 1, 4), **o
    ),
    "select_tokens: rows of the batch": lambda x, **o: ok.select_tokens(x, 3, **o),
    "gather_rows: tokens": lambda x, **o: ok.gather_rows(x[None], LAST, **o),
    "gather_rows: rows of the batch": lambda x, **o: ok.gather_rows(x[:, None], ints(0, 0, 0, 0)[:, None], **o),
    "scatter_rows_: tokens": lambda x, **o: scattered(ok.scatter_rows_, x[None], LAST, random(1, 1, 8, seed=1), **o),
    "scatter_rows_: rows": lambda x, **o: scattered(ok.scatter_rows_, torch.zeros(1, 4, 8).half(), ALL, x[None], **o),
    "scatter_add_rows_: tokens": lambda x, **o: scattered(
        ok.scatter_add_rows_, x[None], LAST, *(random(1, 1, 8, seed=s) for s in (1, 2)), **o
    ),
    "scatter_add_rows_: residual": lambda x, **o: scattered(
        ok.scatter_add_rows_, torch.zeros(1, 4, 8).half(), ALL, random(1, 4, 8, seed=1), x[None], **o
    ),
    "gather_add_rms_norm: tokens": lambda x, **o: ok.gather_add_rms_norm(
        x[None], LAST, random(1, 1, 8, seed=1), ONES, 1e-6, **o
    ),
    "gather_add_rms_norm: addend": lambda x, **o: ok.gather_add_rms_norm(
        random(1, 5, 8, seed=1), ALL + 1, x[None], ONES, 1e-6, **o
    ),
    "silu_and_mul: rows": lambda x, **o: ok.silu_and_mul(x[None], random(1, 4, 8, seed=1), **o),
    "add_low_rank: tokens": lambda x, **o: ok.add_low_rank(x[None], random(1, 4, 3, seed=1), random(8, 3), **o),
    "add_low_rank: rows of the batch": lambda x, **o: ok.add_low_rank(
        x[:, None], random(4, 1, 3, seed=1), random(8, 3), sink_positions=ints(-1, -1, 0, -1), **o
    ),
    "add_low_rank: low": lambda x, **o: ok.add_low_rank(
        random(4, 8, seed=1), x, random(8, 8, seed=2), cu_seqlens=ints(0, 1, 4), **o
    ),
    "add_low_rank: up": lambda x, **o: ok.add_low_rank(random(1, 3, 4, seed=1), random(1, 3, 8, seed=2), x, **o),
    "apply_rotary_at: tokens": lambda x, **o: ok.apply_rotary_at(x[None, None], *[TABLE.expand(1, 4, 8)] * 2, **o),
    "apply_rotary_at: heads": lambda x, **o: ok.apply_rotary_at(x[None, :, None], TABLE, TABLE, **o),
    "apply_rotary_at: tables": lambda x, **o: ok.apply_rotary_at(
        random(1, 1, 4, 16, seed=1), x[None], x[None], ALL, rotary_dim=16, **o
    ),
    "apply_rotary_and_cache_: blocks": lambda x, **o: cached(k_cache=x[:, None, None], **o),
    "apply_rotary_and_cache_: places in a block": lambda x, **o: cached(v_cache=x[None, :, None], **o),
    "apply_rotary_and_cache_: heads of the cache": lambda x, **o: cached(k_cache=x[None, None], **o),
    "apply_rotary_and_cache_: keys": lambda x, **o: cached(keys=x[:, None], **o),
    "apply_rotary_and_cache_: heads of the values": lambda x, **o: cached(values=x[None], **o),
    "apply_rotary_and_cache_: tables": lambda x, **o: cached(
        cos=x, sin=x, positions=ints(3), keys=ONES[None, None], **o
    ),
    "sparse_query_attention: keys": lambda x, **o: ok.sparse_query_attention(
        random(1, 1, 1, 8, seed=1), x[None, None], x[None, None], LAST, **o
    ),
    "sparse_query_attention: heads of the keys": lambda x, **o: ok.sparse_query_attention(
        random(1, 4, 1, 8, seed=1), x[None, :, None], x[None, :, None], ints(0)[None], **o
    ),
    "sparse_query_attention: queries": lambda x, **o: ok.sparse_query_attention(
        x[None, None], *[random(1, 1, 4, 8, seed=1)] * 2, ALL, **o
    ),
    "sparse_query_attention: heads of the queries": lambda x, **o: ok.sparse_query_attention(
        x[None, :, None], *[random(1, 1, 4, 8, seed=1)] * 2, LAST, **o
    ),
    "sparse_query_attention_varlen: keys": lambda x, **o: varlen(random(1, 1, 8, seed=1), x[:, None], ints(3), **o),
    "sparse_query_attention_varlen: queries": lambda x, **o: varlen(
        x[:, None], random(4, 1, 8, seed=1), ints(0, 1, 2, 3), **o
    ),
    "sparse_query_attention_paged: pages": lambda x, **o: paged(x, x[:, None, None], 3, ints(3, 2, 1, 0)[None], **o),
    "sparse_query_attention_paged: slots": lambda x, **o: paged(x, x[None, :, None], 3, ints(0)[None], **o),
    "sparse_query_attention_paged: heads": lambda x, **o: paged(x, x[None, None], 0, ints(0)[None], heads=4, **o),
}


def test_every_op_is_here() -> None:
    from tests.orthorank_kernels.every_op import NOT_OPS

    assert {name.split(":")[0] for name in CALLS} == set(ok.__all__) - NOT_OPS


@pytest.mark.parametrize("name", CALLS)
def test_far_views_are_read_where_they_lie(name: str) -> None:
    call, x = CALLS[name], far_rows(torch.float32 if name.startswith("select_tokens") else torch.float16)
    near = x.clone()
    expected = call(near, backend="torch")
    for got, wanted in zip(flat(call(x, backend="triton")), flat(expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=4e-3, atol=4e-3)
