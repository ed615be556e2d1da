"""apply_rotary_at: what is said of bad input."""

import pytest
import torch

from orthorank_kernels import apply_rotary_at
from tests.orthorank_kernels.ops.test_rotary import tables
from tests.orthorank_kernels.tools import DEVICE

X, COS, POSITIONS = torch.zeros(2, 3, 4, 8), torch.zeros(1, 6, 8), torch.zeros(2, 4, dtype=torch.int32)
BAD_CALLS = {
    "x has two dimensions": ((X[0, 0], COS, COS), ValueError, r"x has shape \[4, 8\]; it must be \[batch, heads, sel"),
    "tables of the other layout": ((X[0], COS, COS), ValueError, r"cos has shape \[1, 6, 8\]; it must be \[tokens, wi"),
    "positions of the other layout": (
        (X[0], COS[0], COS[0], POSITIONS),
        ValueError,
        r"positions has shape \[2, 4\]; it must be \[selected\]",
    ),
    "sin of another shape": (
        (X, COS, COS[:, :5], POSITIONS),
        ValueError,
        r"sin has shape \[1, 5, 8\]; the shape of cos",
    ),
    "sin of another dtype": ((X, COS, COS.half(), POSITIONS), TypeError, "sin has dtype float16 and cos float32"),
    "tables of another batch": ((X, *[COS.repeat(3, 1, 1)] * 2, POSITIONS), ValueError, "the batch of x, 2, or 1"),
    "tables wider than a head": ((X, *[COS.repeat(1, 1, 2)] * 2, POSITIONS), ValueError, "x a head_dim of 8; without"),
    "tables of an odd width": (
        (X, *[COS[..., :5]] * 2, POSITIONS),
        ValueError,
        "must be the head_dim, above 0 and even",
    ),
    "an odd head_dim": (
        (X[..., :5], *[COS[..., :5]] * 2, POSITIONS),
        ValueError,
        "must be the head_dim, above 0 and even",
    ),
    "no positions for a part": ((X, COS, COS), ValueError, "cos has 6 tokens and x 4; pass positions"),
    "positions of another count": ((X, COS, COS, POSITIONS[:, :3]), ValueError, r"the shape of x asks for \[2, 4\]"),
    "positions are int64": ((X, COS, COS, POSITIONS.long()), TypeError, "positions has dtype int64; it may be int32"),
    "x is strided": ((X.transpose(2, 3), COS[..., :4], COS[..., :4], POSITIONS), ValueError, "the last one must be 1"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_argument_and_the_fix(name):
    args, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        apply_rotary_at(*args)


BAD_OPTIONS = {
    "interleaved is a word": ({"interleaved": "yes"}, TypeError, "interleaved is 'yes'; it must be True or False"),
    "odd rotary_dim": ({"rotary_dim": 5}, ValueError, "rotary_dim is 5 and cos has .* rotary_dim must be even"),
    "rotary_dim above head_dim": ({"rotary_dim": 10}, ValueError, "rotary_dim is 10; it must be an int from 2 to 8"),
    "out of another shape": ({"out": X[:1]}, ValueError, "out has shape .* the shape of x"),
    "out of another dtype": ({"out": X.half()}, TypeError, "out has dtype float16 and x float32"),
    "out shares memory": ({"out": X[:, :1].expand(-1, 3, -1, -1)}, ValueError, "share memory, and it is written to"),
    "out is no tensor": ({"out": [X]}, TypeError, "out is a list; it must be a tensor"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_errors_name_the_option_and_the_fix(name):
    options, error, message = BAD_OPTIONS[name]
    with pytest.raises(error, match=message):
        apply_rotary_at(X, COS, COS, POSITIONS, **options)


def test_tables_too_narrow():
    with pytest.raises(ValueError, match=r"rotary_dim is 6 and cos has shape .* half of it where nothing is repeated"):
        apply_rotary_at(X, COS[..., :2], COS[..., :2], POSITIONS, rotary_dim=6)


def test_float64_has_no_kernel():
    cos, sin = tables(1, 4, 8, torch.float64)
    with pytest.raises(TypeError, match="float64"):
        apply_rotary_at(X.to(DEVICE, torch.float64), cos, sin, backend="triton")
