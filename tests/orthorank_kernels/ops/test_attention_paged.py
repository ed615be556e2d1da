"""sparse_query_attention_paged: the caches of serving stacks as they are, against a loop over queries."""

from typing import Any

import pytest
import torch

from orthorank_kernels.ops.attention_paged import sparse_query_attention_paged
from orthorank_kernels.ops.attention_varlen import sparse_query_attention_varlen
from tests.orthorank_kernels.attention_cases import FP8, Packed, assert_right, integers, packed, random, stated_packed
from tests.orthorank_kernels.cache_layouts import LAYOUTS, Paged, paged
from tests.orthorank_kernels.ops.test_attention_options import Largest
from tests.orthorank_kernels.tools import DEVICE, DTYPES, poisoned_outputs

BACKENDS = ("torch", "triton")
OPS = torch.ops.orthorank_kernels
LENGTHS, COUNTS = (37, 1, 0, 70, 9, 20), (12, 1, 0, 33, 0, 20)  # an empty sequence, one without queries, one dense


def sinks(heads: int = 4) -> torch.Tensor:
    return random(heads, seed=5) * 4


def check(case: Packed, cache: Paged, backend: str, like: Packed | None = None, **options: Any) -> torch.Tensor:
    """``like``: the keys and values that the cache stands for, where they are not those of ``case``."""

    def run(backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        with poisoned_outputs():
            out, lse = sparse_query_attention_paged(*cache, return_lse=True, backend=backend, **options)
        assert out.is_contiguous()
        assert lse.is_contiguous()
        return out, lse

    scaled = options.get("k_scale") is not None
    stated = {k: v for k, v in options.items() if k not in ("table_rows", "k_scale", "v_scale")}
    exact = stated_packed(case if like is None else like, **stated)
    return assert_right(run, exact, case.q.dtype, backend, case.q.dtype if scaled else torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: str) -> None:
    case = packed((37, 0, 50), (12, 0, 9))
    check(case, paged(case, 16, layout), backend, window=40)


def test_the_layouts_differ_in_memory() -> None:
    views = {layout: paged(packed((20,), (2,)), 16, layout).k_cache for layout in LAYOUTS}
    assert all(view.shape == (5, 16, 2, 32) for view in views.values())
    strides = [view.stride() for view in views.values()]
    assert len(set(strides)) == len(strides) - 1  # split joint pages of heads and tokens: flash-attn's has its own
    assert sum(view.is_contiguous() for view in views.values()) == 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "block_size", [1, 16, 48, 128, *(pytest.param(size, marks=pytest.mark.slow) for size in (32, 256))]
)
def test_block_sizes(block_size: int, backend: str) -> None:
    case = packed((300, 1, 0, 70), (20, 1, 0, 33))
    check(case, paged(case, block_size), backend)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window of 1": {"window": 1},
    "window over everything": {"window": 2**40},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": sinks()},
    "everything": {"window": 30, "softcap": 3.0, "sinks": sinks(), "scale": 0.5, "max_seqlen_k": 70},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], backend: str) -> None:
    case = packed(LENGTHS, COUNTS, tail=3)
    out = check(case, paged(case, 16), backend, **options)
    # Without the lse: torch's fused attention, and a kernel of its own.
    if backend == "torch" or options.get("softcap") == 3.0:
        alone = sparse_query_attention_paged(*paged(case, 16), backend=backend, **options)
        torch.testing.assert_close(alone, out, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_dtypes(dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 runs in PyTorch")
    case = packed(LENGTHS, COUNTS, dtype=dtype)
    check(case, paged(case, 16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dim", [32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim: int, backend: str) -> None:
    case = packed((40, 9), (15, 3), (2, 1), dim)
    check(case, paged(case, 16), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (12, 4), (16, 1), (7, 1)], ids=str)
def test_groups_of_query_heads(heads: tuple[int, int], backend: str) -> None:
    case = packed((40, 9), (15, 3), heads)
    check(case, paged(case, 16, "vllm LBNHC"), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_few_queries_over_long_keys(backend: str) -> None:
    case = packed((500, 3, 270), (1, 1, 2))
    check(case, paged(case, 16), backend)
    check(case, paged(case, 32), backend, max_seqlen_k=500, window=300)


def dequantised(case: Packed, k_scale: torch.Tensor, v_scale: torch.Tensor, kind: torch.dtype = FP8) -> Packed:
    """What a float8 cache of these keys and values stands for."""
    k, v = (x.to(kind).double() * s.double().reshape(-1, 1) for x, s in ((case.k, k_scale), (case.v, v_scale)))
    return case._replace(k=k, v=v)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scales", ["none", "number", "one", "heads"])
def test_float8_caches(scales: str, dtype: torch.dtype, backend: str) -> None:
    case = packed(LENGTHS, COUNTS, dtype=dtype)
    shape = {"none": (1,), "number": (), "one": (1,), "heads": (2,)}[scales]
    k_scale, v_scale = (random(*shape, seed=seed).abs() + 0.3 for seed in (11, 12))
    options: dict[str, Any] = {"k_scale": k_scale, "v_scale": v_scale}
    if scales == "none":
        k_scale = v_scale = torch.ones(1, device=DEVICE)
        options = {}
    cache = paged(case, 16, dtype=FP8)
    check(case, cache, backend, dequantised(case, k_scale, v_scale), softcap=5.0, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float8_keys_and_queries_near_nothing_see_no_later_key(backend: str) -> None:
    case = packed(LENGTHS, COUNTS, dtype=torch.bfloat16)
    case = case._replace(q=case.q * 1e-34)
    small, one = torch.full((1,), 1e-3, device=DEVICE), torch.ones(1, device=DEVICE)
    check(case, paged(case, 16, dtype=FP8), backend, dequantised(case, small, one), k_scale=small)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float8_with_more_exponents(backend: str) -> None:
    case, kind = packed(LENGTHS, COUNTS, dtype=torch.bfloat16), torch.float8_e5m2
    scales = [random(2, seed=seed).abs() + 0.3 for seed in (11, 12)]
    cache = paged(case, 16, dtype=kind)
    check(case, cache, backend, dequantised(case, *scales, kind), k_scale=scales[0], v_scale=scales[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_scale_of_two(backend: str) -> None:
    case = packed((30, 20), (9, 5))
    one, other = torch.ones(1, device=DEVICE), torch.full((1,), 0.25, device=DEVICE)
    cache = paged(case, 16, dtype=FP8)
    check(case, cache, backend, dequantised(case, other, one), k_scale=other)
    plain, halved = (sparse_query_attention_paged(*cache, v_scale=s, backend=backend) for s in (None, other))
    torch.testing.assert_close(halved, plain / 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_the_block_table_by_number(backend: str) -> None:
    case = packed((50, 33, 20), (17, 12, 4))
    cache = paged(case, 16)
    expected = sparse_query_attention_paged(*cache, backend=backend)
    pool = torch.full((9, cache.block_table.shape[1] + 5), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    rows = integers([6, 0, 3])
    pool[rows, : cache.block_table.shape[1]] = cache.block_table
    for table in (pool, pool[:, : cache.block_table.shape[1]]):
        wide = cache._replace(block_table=table)
        assert torch.equal(sparse_query_attention_paged(*wide, table_rows=rows, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_one_token(backend: str) -> None:
    """SGLang: a pool of slots, and ``req_to_token`` with a row for each request that may be alive."""
    case = packed((50, 33), (17, 12))
    slots = torch.randperm(120, generator=torch.Generator().manual_seed(3))[:83].to(DEVICE)
    k_pool, v_pool = (torch.full((121, 2, 32), float("nan"), device=DEVICE) for _ in range(2))
    k_pool[slots], v_pool[slots] = case.k, case.v
    req_to_token = torch.full((7, 60), -1, dtype=torch.int32, device=DEVICE)
    req_to_token[4, :50], req_to_token[1, :33] = slots[:50].int(), slots[50:].int()
    cache = Paged(
        case.q, k_pool.view(-1, 1, 2, 32), v_pool.view(-1, 1, 2, 32), case.positions, case.cu_selected,
        req_to_token, integers([50, 33]),
    )  # fmt: skip
    check(case, cache, backend, table_rows=integers([4, 1]), window=20)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tail", [1, 70])
def test_queries_past_the_selected_ones_give_nothing(tail: int, backend: str) -> None:
    case = packed(LENGTHS, COUNTS, tail=tail)
    check(case, paged(case, 16), backend)
    case.positions[-tail:] = 5  # whatever stands there
    case.q[-tail:] = float("nan")
    out, lse = sparse_query_attention_paged(*paged(case, 16), sinks=sinks(), return_lse=True, backend=backend)
    assert (out[-tail:] == 0).all()
    assert (lse[-tail:] == float("-inf")).all()
    assert out[:-tail].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_at_all(backend: str) -> None:
    for lengths, counts, tail in (((), (), 0), ((), (), 3), ((5,), (0,), 0), ((0, 0), (0, 0), 4), ((7, 5), (0, 0), 2)):
        case = packed(lengths, counts, tail=tail)
        cache = paged(case, 16)
        no_pages = cache._replace(
            k_cache=cache.k_cache[:0], v_cache=cache.v_cache[:0], block_table=cache.block_table[:, :0]
        )
        for tensors in (cache, no_pages):
            with poisoned_outputs():
                out, lse = sparse_query_attention_paged(*tensors, return_lse=True, backend=backend)
            assert out.shape == (tail, 4, 32)
            assert lse.shape == (tail, 4)
            assert (out == 0).all()
            assert (lse == float("-inf")).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("block_size", "options"), [(16, {"window": 40, "softcap": 2.0, "sinks": sinks()}), (48, {})])
def test_packed_keys_are_pages_gathered(block_size: int, options: dict[str, Any], backend: str) -> None:
    case = packed(LENGTHS, COUNTS, tail=2)
    ours = sparse_query_attention_paged(*paged(case, block_size), return_lse=True, backend=backend, **options)
    theirs = sparse_query_attention_varlen(*case.tensors, return_lse=True, backend=backend, **options)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_in_chunks_equals_the_prompt_at_once(backend: str) -> None:
    """The cache as it is at the last chunk: earlier chunks must not see what later ones wrote."""
    case = packed((150, 70), (60, 33))
    cache = paged(case, 16)
    once = sparse_query_attention_paged(*cache, return_lse=True, backend=backend)
    owner = torch.tensor([0] * 60 + [1] * 33, device=DEVICE)
    for begin, end in ((0, 41), (41, 42), (42, 150)):
        here = (case.positions >= begin) & (case.positions < end)
        counts = [int((here & (owner == s)).sum()) for s in (0, 1)]
        chunk = cache._replace(
            q=case.q[here],
            positions=case.positions[here],
            cu_selected=integers([0, counts[0], sum(counts)]),
            seq_lens=integers([min(150, end), min(70, end)]),
        )
        for a, b in zip(sparse_query_attention_paged(*chunk, return_lse=True, backend=backend), once, strict=True):
            torch.testing.assert_close(a, b[here], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_that_no_query_sees_are_not_read(backend: str) -> None:
    case = packed((160, 96), (6, 4))
    case.positions[:] = integers([70, 75, 80, 90, 92, 95, 32, 40, 41, 60])
    cache = paged(case, 16)
    clean = sparse_query_attention_paged(*cache, window=20, backend=backend)
    for s, (first, last) in enumerate(((70 - 19, 95), (32 - 19, 60))):
        for page, block in enumerate(cache.block_table[s, : (160, 96)[s] // 16].tolist()):
            token = torch.arange(page * 16, page * 16 + 16, device=DEVICE)
            for x in (cache.k_cache, cache.v_cache):
                x[block, (token < first) | (token > last)] = float("nan")
    assert torch.equal(sparse_query_attention_paged(*cache, window=20, backend=backend), clean)


def test_pytorch_reads_what_is_needed_alone() -> None:
    case = packed((4000, 16), (3, 2), (2, 1), 16)
    case.positions[:] = integers([2000, 2001, 2040, 3, 9])
    cache = Paged(*(x.cpu() for x in paged(case, 16)))
    with Largest() as largest:
        sparse_query_attention_paged(*cache, window=64, backend="torch")
    assert largest.elements <= (41 + 64 + 32) * 16  # keys in sight, in whole pages
