"""Queries rotated as attention reads them: to the last bit what `apply_rotary_at` and then attention give."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

import orthorank_kernels as ok
from tests.orthorank_kernels.every_op import Call, Numbers, Sizes, calls
from tests.orthorank_kernels.tools import DEVICE

SIZES = Sizes(batch=2, tokens=24, selected=5, heads=2, kv_heads=1, head_dim=20)
LAYOUTS = {
    "sparse_query_attention": "window, padding",
    "sparse_query_attention_varlen": "everything",
    "sparse_query_attention_paged": "everything",
}


def call_of(op: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    """With a missing query at the end of each sequence."""
    call = calls(Numbers(DEVICE, seed), SIZES.with_(dtype=dtype))[f"{op}, {LAYOUTS[op]}"]

    def gap(positions: Tensor) -> Tensor:
        positions = positions.clone().view(SIZES.batch, SIZES.selected)
        positions[:, -1] = -1
        return positions.view(call.args[3].shape)

    return call.where(gap, 3)


def tables(op: str, rotary_dim: int, width: int, dtype: torch.dtype = torch.float32, rows: int = 1) -> Any:
    """cos and sin, of which the last dimension repeats itself if ``width`` is ``rotary_dim``."""
    new = Numbers(DEVICE, seed=7)
    batch = (rows,) if op == "sparse_query_attention" else ()
    half = (new.floats(*batch, SIZES.tokens, rotary_dim // 2, dtype=dtype) for _ in range(2))
    return [torch.cat([table] * (2 * width // rotary_dim), -1) for table in half]


def is_rotation_and_attention(op: str, rotary_dim: int, width: int, interleaved: bool, backend: str) -> None:
    dtype = torch.float16 if width == 8 else torch.float32
    call = call_of(op, dtype)
    cos, sin = tables(op, rotary_dim, width, dtype, rows=1 if interleaved else SIZES.batch)
    how = {"interleaved": interleaved, "rotary_dim": rotary_dim, "backend": backend}
    turned = call.where(lambda q: ok.apply_rotary_at(q, cos, sin, call.args[3], **how), 0)
    options = {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": interleaved, "rotary_dim": rotary_dim}
    expected, found = turned(backend=backend), call(**options, backend=backend)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (expected, found)), strict=True):
        assert torch.equal(one, other)
    out = tuple(map(torch.empty_like, found)) if isinstance(found, tuple) else torch.empty_like(found)
    call(**options, backend=backend, out=out)
    assert torch.equal(out[0], found[0]), "into memory of the caller"


@pytest.mark.parametrize("op", LAYOUTS)
def test_the_reference_rotates_too(op):
    is_rotation_and_attention(op, 10, 5, True, "reference")


FEW = [("sparse_query_attention", 16, 8, False), ("sparse_query_attention_varlen", 10, 5, True)]
FEW += [("sparse_query_attention_paged", 20, 20, False)]
EVERY = [
    (op, n, width, pairs) for op in LAYOUTS for n, width in ((20, 20), (10, 5), (16, 8)) for pairs in (False, True)
]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("op", "rotary_dim", "width", "interleaved"),
    [pytest.param(*case, marks=() if case in FEW else pytest.mark.slow) for case in EVERY],
)
def test_it_is_apply_rotary_at_followed_by_attention(op, rotary_dim, width, interleaved, backend):
    is_rotation_and_attention(op, rotary_dim, width, interleaved, backend)


@pytest.mark.parametrize("op", LAYOUTS)
def test_rows_that_see_nothing_need_no_angle(op):
    """A query past the last sequence, and one before its row's first key: their positions may be past the tables."""
    if op == "sparse_query_attention":
        call = call_of(op).where(lambda starts: torch.full_like(starts, SIZES.tokens), "starts")
    else:
        call = call_of(op).where(lambda cu: torch.zeros_like(cu), 4)
    cos, sin = (table[..., :1, :] for table in tables(op, 20, 20))
    launcher = __import__("orthorank_kernels.triton.attention", fromlist=["_"]).__dict__[op]
    given = {**call.options, "rotary_cos": cos, "rotary_sin": sin, "rotary_dim": 20}
    names = inspect.signature(launcher).parameters
    call = call.where(lambda positions: torch.full_like(positions, 2**30), 3)
    named = {n: given.get(n) for n in names if n != "out"} | dict(zip(names, call.args, strict=False))
    out, _ = launcher(**named | {"rotary_interleaved": False, "return_lse": False})
    assert (out == 0).all()


@pytest.mark.parametrize("op", LAYOUTS)
def test_errors_name_the_argument(op):
    call = call_of(op)
    cos, sin = tables(op, 20, 20)
    for wrong, kind, message in (
        ({"rotary_cos": cos}, ValueError, "rotary_sin is None and rotary_cos is not"),
        ({"rotary_sin": sin}, ValueError, "rotary_cos is None and rotary_sin is not"),
        ({"rotary_dim": 4}, ValueError, "rotary_dim is 4; it must be None without tables"),
        ({"rotary_cos": cos, "rotary_sin": sin[..., :5]}, ValueError, "rotary_sin has shape"),
        ({"rotary_cos": cos[..., :8], "rotary_sin": sin[..., :8]}, ValueError, "rotary_cos has shape .* and q a head"),
        ({"rotary_cos": cos[..., :2, :], "rotary_sin": sin[..., :2, :]}, IndexError, "positions"),
        ({"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": 1}, TypeError, "rotary_interleaved is"),
        ({"rotary_cos": cos.double(), "rotary_sin": sin}, ValueError, "rotary_sin"),
    ):
        with pytest.raises((kind, TypeError) if kind is ValueError else kind, match=message):
            call(**wrong)
