"""Bytes that the kernels ask memory for, counted by the interpreter, against the fewest that any kernel could.

A kernel that is bound by memory is as fast as its traffic is small. What is counted: every element that a load, store
or atomic does not mask off, in every program, so a row that two programs read counts twice.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from orthorank_kernels import apply_rotary_at, gather_add_rms_norm, gather_rows, scatter_rows_, select_tokens
from orthorank_kernels.dispatch import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
HALF = torch.bfloat16


@dataclass
class Traffic:
    requested: int = 0
    launches: int = 0


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what kernels do inside the block."""
    from triton.runtime import interpreter

    builder, traffic = interpreter.interpreter_builder, Traffic()
    launch = interpreter.GridExecutor.__call__

    def counting(access: Callable, element_size: Callable) -> Callable:
        def call(ptrs, *args):
            mask = args[0 if access.__name__ == "create_masked_load" else 1]
            traffic.requested += int(np.broadcast_to(mask.data, ptrs.data.shape).sum()) * element_size(ptrs)
            return access(ptrs, *args)

        return call

    def size(ptrs) -> int:
        return ptrs.get_element_ty().primitive_bitwidth // 8

    def counted_launch(self, *args, **kwargs):
        traffic.launches += 1
        return launch(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("create_masked_load", "create_masked_store"):
            patch.setattr(builder, name, counting(getattr(builder, name), size), raising=True)
        patch.setattr(interpreter.GridExecutor, "__call__", counted_launch)
        yield traffic


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


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
    assert gathered == scattered == Traffic(requested=fewest, launches=1)


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
    from orthorank_kernels.triton import rows as launcher

    many = launcher.rows_per_program(n_rows)
    monkeypatch.setattr(launcher, "rows_per_program", lambda _: many)
    x, positions, weight = torch.ones(1, 72, 576, dtype=HALF), every_third(72), torch.ones(576, dtype=HALF)
    rows = torch.ones(1, 24, 576, dtype=HALF)
    fewest = 4 * bytes_of(rows) + bytes_of(positions, weight)
    with counted() as traffic:
        gather_add_rms_norm(x, positions, rows, weight, 1e-5, backend="triton")
    assert traffic.launches == 1
    assert fewest <= traffic.requested <= allowed * fewest


@pytest.mark.parametrize(("heads", "head_dim", "rotary_dim"), [(9, 64, 64), (32, 128, 128), (4, 80, 32)])
def test_rotary_reads_each_angle_once_for_all_heads(heads, head_dim, rotary_dim):
    x = torch.ones(1, 10, heads, head_dim, dtype=HALF).transpose(1, 2)
    table, positions = torch.ones(1, 30, rotary_dim, dtype=HALF), every_third(30)
    with counted() as traffic:
        apply_rotary_at(x, table, table, positions, backend="triton")
    angles = 10 * rotary_dim // 2 * table.element_size()
    assert traffic == Traffic(requested=2 * bytes_of(x) + 2 * angles + bytes_of(positions), launches=1)


@pytest.mark.parametrize(("tokens", "allowed"), [(2000, 1.01), (8192, 1.01), (20_000, 5.0)])
def test_selection_reads_scores_once_while_a_row_fits_in_registers(tokens, allowed):
    scores = torch.rand(1, tokens)
    with counted() as traffic:
        positions, counts = select_tokens(scores, tokens // 3, backend="triton")
    assert traffic.launches == 1
    assert traffic.requested <= allowed * bytes_of(scores, positions, counts)
