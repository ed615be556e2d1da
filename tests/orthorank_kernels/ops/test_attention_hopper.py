"""sparse_query_attention by the kernel for sm_90, on such a GPU: no interpreter of Triton runs it, so `tests/ptx` has
what its code computes, and this what the hardware does."""

import pytest
import torch

from orthorank_kernels import (
    apply_rotary_at,
    sparse_query_attention,
    sparse_query_attention_paged,
    sparse_query_attention_varlen,
)
from orthorank_kernels.triton import configs
from tests.orthorank_kernels.ops.test_attention import random, some_positions, written_out
from tests.orthorank_kernels.tools import DEVICE, assert_within_budget, poisoned_outputs

if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    pytest.skip("the kernel is for GPUs of compute capability 9.0", allow_module_level=True)


@pytest.fixture(autouse=True)
def _no_splits(monkeypatch):
    """But where a test says so: few programs share their keys."""
    monkeypatch.setattr(configs, "splits", lambda *given: 1)


HEADS = [(dim, heads) for dim in (64, 128) for heads in ((8, 2), (4, 4), (14, 2), (9, 3))]
HEADS += [(96, (8, 2)), (192, (14, 2)), (256, (8, 2)), (256, (14, 2))]


def check(
    dim: int,
    heads: tuple[int, int],
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    starts: tuple[int, ...] | None = None,
    fewer: int = 0,
) -> None:
    """``sizes``: batch, keys and selected tokens. What no query sees is NaN; with ``fewer`` some positions are -1."""
    batch, keys, selected = sizes
    q = random(batch, heads[0], selected, dim, dtype=dtype, seed=1)
    k, v = (random(batch, heads[1], keys, dim, dtype=dtype, seed=seed) for seed in (2, 3))
    positions = some_positions(batch, keys - 9, selected, fewer)
    first = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=DEVICE)
    exact = written_out(q, k, v, positions, starts=first)
    eager, eager_lse = sparse_query_attention(q, k, v, positions, starts=first, return_lse=True, backend="torch")
    for row, x in enumerate(zip(k, v, strict=True)):
        for keys_or_values in x:
            keys_or_values[:, int(positions[row].max()) + 1 :] = float("nan")
            keys_or_values[:, : 0 if starts is None else starts[row]] = float("nan")
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    with poisoned_outputs():
        out, lse = sparse_query_attention(q, k, v, positions, starts=first, return_lse=True, backend="triton")
    assert_within_budget(out, eager, exact, dtype)
    assert torch.equal(lse.isinf(), eager_lse.isinf())
    torch.testing.assert_close(lse, eager_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("dim", "heads"), HEADS)
@pytest.mark.parametrize("sizes", [(2, 2047, 681), (1, 513, 99), (3, 130, 70)])
def test_it_is_within_the_budget(dim, heads, sizes, dtype, monkeypatch):
    check(dim, heads, sizes, dtype, monkeypatch)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_padding_and_rows_that_stand_nowhere(dim, monkeypatch):
    check(dim, (8, 2), (3, 1000, 333), torch.bfloat16, monkeypatch, starts=(0, 7, 600), fewer=150)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_packed_sequences(dim, monkeypatch):
    lengths, counts = (2000, 1, 700, 0, 350), (666, 1, 300, 0, 200)
    q = random(sum(counts), 8, dim, dtype=torch.bfloat16, seed=1)
    k, v = (random(sum(lengths), 2, dim, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    positions = torch.cat([some_positions(1, n, c)[0] for n, c in zip(lengths, counts, strict=True)])
    ends = [torch.tensor((0, *n), device=DEVICE).cumsum(0).int() for n in (counts, lengths)]
    exact = sparse_query_attention_varlen(q.float(), k.float(), v.float(), positions, *ends, backend="torch")
    eager = sparse_query_attention_varlen(q, k, v, positions, *ends, backend="torch")
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    with poisoned_outputs():
        out = sparse_query_attention_varlen(q, k, v, positions, *ends, backend="triton")
    assert_within_budget(out, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize(("dim", "page"), [(64, 16), (128, 16), (128, 32), (128, 256), (192, 16), (256, 64)])
def test_pages(dim, page, window, monkeypatch):
    """Slots that no query sees are NaN, and so is the page that a table names elsewhere."""
    lengths, counts = (2000, 1, 700, 0, 350), (666, 1, 300, 0, 200)
    q = random(sum(counts), 8, dim, dtype=torch.bfloat16, seed=1)
    most = -(-max(lengths) // page)
    k, v = (random(5 * most + 1, page, 2, dim, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    table = torch.randperm(5 * most, generator=torch.Generator().manual_seed(4)).view(5, most).int().to(DEVICE)
    rows = [some_positions(1, n, c)[0] for n, c in zip(lengths, counts, strict=True)]
    for row, positions in enumerate(rows):
        first, end = (0, 0) if len(positions) == 0 else (int(positions[0]), int(positions[-1]) + 1)
        first = 0 if window is None else max(0, first - window + 1)
        slots = torch.arange(most * page, device=DEVICE)
        slots = slots[(slots < first) | (slots >= end)]
        for x in (k, v):
            x[table[row, slots // page].long(), slots % page] = float("nan")
        table[row, : first // page] = table[row, -(-end // page) :] = 5 * most
    k[5 * most] = v[5 * most] = float("nan")
    ends = torch.tensor((0, *counts), device=DEVICE).cumsum(0).int()
    rest = (torch.cat(rows), ends, table, torch.tensor(lengths, dtype=torch.int32, device=DEVICE))
    exact = sparse_query_attention_paged(q.float(), k.float(), v.float(), *rest, window=window, backend="torch")
    eager = sparse_query_attention_paged(q, k, v, *rest, window=window, backend="torch")
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    with poisoned_outputs():
        out = sparse_query_attention_paged(q, k, v, *rest, window=window, backend="triton")
    assert_within_budget(out, eager, exact, torch.bfloat16)


@pytest.mark.parametrize("splits", [2, 5, 40])
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_split_keys(dim, window, splits, monkeypatch):
    q = random(2, 8, 300, dim, dtype=torch.bfloat16, seed=1)
    k, v = (random(2, 2, 2100, dim, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    positions = some_positions(2, 2100, 300, fewer=40)
    sinks = torch.linspace(-1, 3, 8, device=DEVICE)
    given = {"window": window, "sinks": sinks, "return_lse": True}
    exact, _ = sparse_query_attention(q.float(), k.float(), v.float(), positions, backend="torch", **given)
    eager, eager_lse = sparse_query_attention(q, k, v, positions, backend="torch", **given)
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    monkeypatch.setattr(configs, "splits", lambda *given: splits)
    with poisoned_outputs():
        out, lse = sparse_query_attention(q, k, v, positions, backend="triton", **given)
    assert_within_budget(out, eager, exact, torch.bfloat16)
    torch.testing.assert_close(lse, eager_lse, atol=1e-3, rtol=1e-3)


OPTIONS = {
    "window": {"window": 300},
    "window of 1": {"window": 1},
    "sinks": {"sinks": 3.0},
    "soft-cap": {"softcap": 5.0},
    "everything": {"window": 500, "sinks": -1.0, "softcap": 20.0},
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_windows_caps_and_sinks(dim, options, monkeypatch):
    if "sinks" in options:
        options = options | {"sinks": torch.full((8,), options["sinks"], device=DEVICE)}
    q = random(2, 8, 700, dim, dtype=torch.bfloat16, seed=1)
    k, v = (random(2, 2, 2100, dim, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    positions = some_positions(2, 2100, 700, fewer=40)
    starts = torch.tensor((0, 333), dtype=torch.int32, device=DEVICE)
    given = {"starts": starts, "return_lse": True} | options
    exact, _ = sparse_query_attention(q.float(), k.float(), v.float(), positions, backend="torch", **given)
    eager, eager_lse = sparse_query_attention(q, k, v, positions, backend="torch", **given)
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    with poisoned_outputs():
        out, lse = sparse_query_attention(q, k, v, positions, backend="triton", **given)
    assert_within_budget(out, eager, exact, torch.bfloat16)
    torch.testing.assert_close(lse, eager_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_queries_are_turned_as_by_an_op_of_their_own(dim, interleaved, monkeypatch):
    """To the bit."""
    q = random(2, 300, 8, dim, dtype=torch.bfloat16, seed=1).transpose(1, 2)
    k, v = (random(2, 2, 900, dim, dtype=torch.bfloat16, seed=seed) for seed in (2, 3))
    positions = some_positions(2, 900, 300, fewer=40)
    angles = torch.linspace(0, 99, 900 * dim // 2, device=DEVICE).view(1, 900, -1).repeat(2, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    turned = apply_rotary_at(q, cos, sin, positions, interleaved=interleaved)
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    there = sparse_query_attention(turned, k, v, positions, backend="triton")
    tables = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved}
    here = sparse_query_attention(q, k, v, positions, **tables, backend="triton")
    assert torch.equal(here, there)


def test_the_same_again_and_again(monkeypatch):
    """Without a race the result does not change: neither the order of programs nor that of warps is in it."""
    q, k, v = (
        random(2, heads, n, 128, dtype=torch.bfloat16, seed=n) for heads, n in ((32, 1365), (8, 4096), (8, 4096))
    )
    positions = some_positions(2, 4096, 1365)
    monkeypatch.setenv("ORTHORANK_ATTENTION", "hopper")
    first = sparse_query_attention(q, k, v, positions, backend="triton")
    for _ in range(50):
        assert torch.equal(sparse_query_attention(q, k, v, positions, backend="triton"), first)
