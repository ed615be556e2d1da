"""Programs of attention begin with the longest tiles, of all heads that the L2 cache holds: the order is the rule's."""

import pytest
import torch

from benchmarks.bench_work_order import longest_first
from orthorank_kernels.triton import configs
from orthorank_kernels.triton.hopper import launch as hopper
from tests.orthorank_kernels.fake_gpu import fake_gpus
from tests.orthorank_kernels.tools import DEVICE

triton = pytest.importorskip("triton")
tl = triton.language

from orthorank_kernels.triton import attention, attention_tiles  # noqa: E402
from orthorank_kernels.triton.attention_tiles import find_sequence, find_work  # noqa: E402

QUERIES = 4  # of a tile


@triton.jit
def find_work_kernel(out_ptr, tiles, columns, lanes, together, splits, SPLIT: tl.constexpr):
    batch, column, tile, split = find_work(tl.program_id(0), tiles, columns, lanes, together, splits, SPLIT)
    out_ptr += 3 * tl.program_id(0)
    tl.store(out_ptr, batch * columns + column)
    tl.store(out_ptr + 1, tile)
    tl.store(out_ptr + 2, split)


@triton.jit
def find_sequence_kernel(out_ptr, cu_selected_ptr, n_seqs, n_queries, together, QUERIES: tl.constexpr):
    sequence, begin, end, tile = find_sequence(cu_selected_ptr, n_seqs, n_queries, tl.program_id(0), together, QUERIES)
    out_ptr += 4 * tl.program_id(0)
    tl.store(out_ptr, sequence)
    tl.store(out_ptr + 1, begin)
    tl.store(out_ptr + 2, end)
    tl.store(out_ptr + 3, tile)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize(("columns", "batch", "together"), [(2, 3, 6), (3, 2, 4), (1, 1, 1)])
def test_the_longest_tile_of_every_head_is_first(columns, batch, together, splits):
    tiles, lanes = 5, columns * batch
    out = torch.full((tiles * splits * lanes, 3), -1, dtype=torch.int32, device=DEVICE)
    find_work_kernel[(len(out),)](out, tiles, columns, lanes, together, splits, splits > 1)
    assert out.tolist() == [list(work) for work in longest_first(lanes, tiles, splits, together)]
    assert len({tuple(work) for work in out.tolist()}) == len(out)


@pytest.mark.parametrize("counts", [[9, 0, 22, 4, 1], [7], [0, 0], [5] * 11, []], ids=lambda counts: f"{len(counts)}")
@pytest.mark.parametrize("together", [1, 2, 1000])
def test_packed_tiles_are_in_the_order_of_their_numbers(counts, together, monkeypatch):
    """Of so many sequences together; what lies past the last sequence comes at the end."""
    if len(counts) > 8 and DEVICE == "cpu":  # more than one step of the search reads
        monkeypatch.setattr(attention_tiles, "SEARCH", tl.constexpr(8))
    beyond, n_seqs = 6, len(counts)
    ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0).int().to(DEVICE)
    queries, together = sum(counts) + beyond, min(together, max(1, n_seqs))
    out = torch.full((configs.tiles(queries, QUERIES, n_seqs, packed=True), 4), -1, dtype=torch.int32, device=DEVICE)
    find_sequence_kernel[(len(out),)](out, ends, n_seqs, queries, together, QUERIES)
    found = [(sequence, tile) for sequence, begin, end, tile in out.tolist() if end - tile * QUERIES > begin]
    of = [*counts, beyond]
    every = [(s, tile) for s, count in enumerate(of) for tile in range(-(-count // QUERIES))]
    assert found == sorted(every, key=lambda x: (x[0] == n_seqs, x[0] // together, x[1], x[0]))
    starts = [*ends.tolist(), queries]
    for sequence, begin, end, tile in out.tolist():
        if end - tile * QUERIES > begin:
            assert (begin, end) == (starts[sequence], starts[sequence + 1])


def test_splits_begin_where_a_third_would_be_idle(monkeypatch):
    monkeypatch.setattr(configs, "_multiprocessors", lambda device: 132)
    count = lambda programs, keys=8192: configs.splits(programs, keys, 128, 128, torch.device("cpu"))  # noqa: E731
    assert [count(n) for n in (89, 88, 67, 66, 44, 1)] == [1, 2, 2, 2, 3, 16]
    assert [count(88, keys) for keys in (512, 1023, 1024)] == [1, 1, 2], "four blocks of keys for each"


@pytest.mark.parametrize("kernel", ["", "hopper"])
def test_more_programs_than_32_bits_number_are_refused(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is launched: the tensors have no memory."""
    monkeypatch.setenv("ORTHORANK_ATTENTION", kernel)
    monkeypatch.setattr(hopper, "check", lambda *_, **__: None)  # which wants memory that TMA can read
    with fake_gpus() as gpus:
        q = torch.empty(1, 1, 1, 128, device="cuda:0", dtype=torch.float16).expand(60_000, 64, 100_000, 128)
        k = torch.empty(1, 1, 1, 128, device="cuda:0", dtype=torch.float16).expand(60_000, 64, 100_000, 128)
        positions = torch.empty(1, 1, device="cuda:0", dtype=torch.int32).expand(60_000, 100_000)
        with pytest.raises(ValueError, match=r"are 3,002,880,000 programs; a launch has at most 2,147,483,647"):
            attention.sparse_query_attention(q, k, k, positions, 1.0, None, None, 0, None, None, False, out=(q, None))
    assert not gpus.launches
