"""Bytes that the kernels ask memory for, counted by the interpreter, against the fewest that any kernel could.

A kernel that is bound by memory is as fast as its traffic is small. What is counted: every element that a load, store
or atomic does not mask off, in every program, so a row that two programs read counts twice.
"""

import json

import numpy as np
import pytest
import torch

from benchmarks.byte_report import RESULTS, pair_complaints, pair_limits
from benchmarks.static.case import TARGETS
from benchmarks.static.pairs import Pairs, count_pairs, selected_positions
from benchmarks.traffic.cases import broken_limits, cases, count
from benchmarks.traffic.counting import Traffic, bytes_of, counted
from orthorank_kernels import (
    apply_rotary_at,
    gather_add_rms_norm,
    gather_rows,
    rms_norm_score,
    scatter_rows_,
    select_tokens,
)
from orthorank_kernels.dispatch import interpreting
from tests.orthorank_kernels.tools import set_settings

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
HALF = torch.bfloat16


def every_third(tokens: int) -> torch.Tensor:
    return torch.arange(0, tokens, 3, dtype=torch.int32)[None]


@pytest.mark.parametrize("hidden", [576, 4096])
def test_gather_and_scatter_move_every_byte_once(hidden):
    x, positions = torch.zeros(1, 60, hidden, dtype=HALF), every_third(60)
    rows = torch.ones(1, 20, hidden, dtype=HALF)
    fewest = 2 * bytes_of(rows) + bytes_of(positions)
    with counted() as gathered:
        gather_rows(x, positions, backend="triton")
    with counted() as scattered:
        scatter_rows_(x, positions, rows, backend="triton")
    for traffic in (gathered, scattered):
        assert (traffic.requested, traffic.unique, traffic.launches) == (fewest, fewest, 1)


def test_missing_entries_read_nothing():
    x, positions = torch.zeros(1, 4, 64, dtype=HALF), torch.tensor([[1, -1, -1, -1]], dtype=torch.int32)
    rows = torch.ones(1, 4, 64, dtype=HALF)
    with counted() as gathered:
        gather_rows(x, positions, backend="triton")
    with counted() as scattered:
        scatter_rows_(x, positions, rows, backend="triton")
    assert gathered.requested == bytes_of(rows) + bytes_of(rows[:, :1]) + bytes_of(positions)
    assert scattered.requested == 2 * bytes_of(rows[:, :1]) + bytes_of(positions)


@pytest.mark.parametrize(("n_rows", "allowed"), [(24, 1.25), (10_000, 1.04)])
def test_many_rows_share_one_read_of_the_weight(n_rows, allowed, monkeypatch):
    """Of five rows' worth of bytes for each row, the weight is one, unless eight rows share it."""
    from orthorank_kernels.triton import add_norm as launcher

    many = launcher.norm_settings(576, n_rows, "sm_90")["rows_per_program"]
    set_settings(monkeypatch, "gather_add_rms_norm", few_rows=1, rows=many)
    x, positions, weight = torch.ones(1, 72, 576, dtype=HALF), every_third(72), torch.ones(576, dtype=HALF)
    rows = torch.ones(1, 24, 576, dtype=HALF)
    fewest = 4 * bytes_of(rows) + bytes_of(positions, weight)
    with counted() as traffic:
        gather_add_rms_norm(x, positions, rows, weight, 1e-5, backend="triton")
    assert traffic.launches == 1
    assert fewest <= traffic.requested <= allowed * fewest


PACKED, SINGLE = (100, 0, 60, 96), (1,) * 256
SCORED = {
    "batch": (None, {}),
    "batch, stored sink": (None, {"sink": True}),
    "batch, LayerNorm and a copy": (None, {"norm": "layer", "bias": True, "copy_input": True}),
    "batch, scores alone": (None, {"write_norm": False}),
    "batch, scores of hidden states": (None, {"norm": "identity", "sink": True}),
    "packed": (PACKED, {"sink": True}),
    "packed, residual": (PACKED, {"residual": True, "sink": True}),
    "packed, residual, first token": (PACKED, {"residual": True}),
    "packed, one token each": (SINGLE, {"residual": True, "sink": True}),
}


@pytest.mark.parametrize(("lengths", "options"), SCORED.values(), ids=SCORED)
def test_the_norm_with_score_reads_shared_vectors_for_many_rows(lengths, options, monkeypatch):
    set_settings(monkeypatch, "rms_norm_score", enough_programs=1)  # as many rows as a program ever takes
    hidden, options = 576, dict(options)
    x = torch.ones(256, hidden, dtype=HALF) if lengths else torch.ones(2, 128, hidden, dtype=HALF)
    weight = None if options.get("norm") == "identity" else torch.ones(hidden, dtype=HALF)
    sequences = len(lengths) if lengths else 2
    for name, shape in (("residual", x.shape), ("bias", (hidden,)), ("sink", (sequences, hidden))):
        if name in options:
            options[name] = torch.ones(shape, dtype=HALF)
    if lengths:
        options["cu_seqlens"] = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    with counted() as traffic:
        result = rms_norm_score(x, weight, 1e-5, **options, backend="triton")
    written = [y for y in result if y is not None and y is not x]
    fewest = bytes_of(*(t for t in (x, weight, *options.values(), *written) if isinstance(t, torch.Tensor)))
    if lengths == PACKED and "sink" in options:
        fewest -= bytes_of(options["sink"][:1])  # that of the empty sequence
    assert traffic.launches == 1
    assert fewest <= traffic.requested <= 1.10 * fewest, traffic.requested / fewest


@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(9, 64, 64), (32, 128, 128), (4, 80, 32)])
def test_rotary_reads_each_angle_once_for_all_heads(heads, head_dim, rotary_dim):
    x = torch.ones(1, 10, heads, head_dim, dtype=HALF).transpose(1, 2)
    table, positions = torch.ones(1, 30, rotary_dim, dtype=HALF), every_third(30)
    with counted() as traffic:
        apply_rotary_at(x, table, table, positions, rotary_dim=rotary_dim, backend="triton")
    angles = 10 * rotary_dim // 2 * table.element_size()
    assert traffic.requested == 2 * bytes_of(x) + 2 * angles + bytes_of(positions)
    assert traffic.launches == 1


@pytest.mark.parametrize(("tokens", "allowed"), [(2000, 1.01), (8192, 1.01), (20_000, 5.0)])
def test_selection_reads_scores_once_while_a_row_fits_in_registers(tokens, allowed):
    scores = torch.rand(1, tokens)
    with counted() as traffic:
        positions, counts, *_ = select_tokens(scores, tokens // 3, backend="triton")
    assert traffic.launches == 1
    assert traffic.requested <= allowed * bytes_of(scores, positions, counts)


# The wide selection takes half a minute, the counted one minutes; `make bench` and the report's --check count it.
GATED = [case for case in cases() if "131,072" not in case.shape and "counted" not in case.shape]


@pytest.mark.parametrize("case", GATED, ids=lambda case: case.name)
def test_limits_of_the_byte_report(case):
    assert not broken_limits(case, count(case))


def test_the_committed_byte_report_keeps_the_limits_and_is_complete():
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    counts = {(row["op"], row["shape"]): row for row in report["ops"]}
    assert set(counts) == {(case.op, case.shape) for case in cases()}, "run: python benchmarks/byte_report.py"
    assert not [broken for case in cases() for broken in broken_limits(case, counts[case.op, case.shape])]
    assert {row["target"] for row in report["attention_pairs"]} == set(TARGETS)
    assert not [broken for row in report["attention_pairs"] for broken in pair_complaints(row)]


def test_a_broken_limit_is_named():
    case = GATED[0]
    counts = {"launches": 1, "unique": 1.0, "requested": 1.01, "atomics": 0}
    assert broken_limits(case, counts) == [f"{case.name}: requested is 1.01, at most 1.0"]
    figures = {"target": "sm_80", "head_dim": 64, "tokens": 32768, "group": 4, "block_n": 64}
    assert pair_complaints(figures | {"executed_over_needed": 1.02}) == [
        "attention on sm_80, head_dim 64, 32,768 tokens: executed_over_needed is 1.02, at most 1.01"
    ]
    assert pair_limits(figures | {"group": 1}) == {}


def test_what_is_unique_counts_once_and_what_is_outside_is_an_error():
    x, traffic = torch.zeros(8, dtype=torch.float32), Traffic()
    traffic.add_tensors((x[2:],))
    addresses = x.data_ptr() + 4 * np.array([[0, 1], [1, 7]])
    traffic.record("read", addresses, np.array([True, True]), 4)
    traffic.record("written", addresses, np.array([[True, False], [False, False]]), 4)
    assert (traffic.requested, traffic.unique) == (4 * 5, 4 * 3 + 4)
    with pytest.raises(LookupError, match="none of its arguments"):
        traffic.record("read", addresses + 32, np.array([True, True]), 4)


def brute_force(positions, block_m, block_n, pack, group, from_last):
    """Pairs and blocks by looking at every tile and every block of keys."""
    queries, executed, blocks, masked = block_m // pack, 0, 0, 0
    ordered = positions[::-1] if from_last else positions
    for first in range(0, len(positions), queries):
        tile = ordered[first : first + queries]
        for n in range(0, max(tile) + 1, block_n):
            blocks += 1
            masked += any(n + block_n - 1 > position for position in tile)
            executed += block_m * block_n
    tiles = -(-group // pack)
    return Pairs(group * sum(p + 1 for p in positions), executed * tiles, blocks * tiles, masked * tiles)


@pytest.mark.parametrize("from_last", [True, False])
@pytest.mark.parametrize(("block_m", "block_n", "pack", "group"), [(16, 8, 4, 4), (16, 8, 1, 1), (8, 32, 3, 7)])
def test_query_key_pairs(block_m, block_n, pack, group, from_last):
    settings = {"block_m": block_m, "block_n": block_n, "pack": pack, "group": group, "from_last": from_last}
    positions = selected_positions(200, 67)
    assert positions == sorted(set(positions))
    assert positions[0] > 0
    assert count_pairs(positions, **settings) == brute_force(positions, **settings)
