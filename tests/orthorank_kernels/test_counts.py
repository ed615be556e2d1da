"""keep_count: one function for ints and tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_kernels import keep_count


@pytest.mark.parametrize(
    ("n", "ratio", "keep_last", "expected"),
    [
        (2048, 1 / 3, 0, 682),
        (100, 0.29, 0, 29),
        (3, 1 / 3, 0, 1),
        (30, 0.1, 0, 3),
        (0, 0.5, 3, 0),
        (1, 0.5, 3, 0),
        (5, 0.2, 3, 3),
        (5, 0.2, 9, 4),
        (5, 0.9, 1, 4),
        (7, 1.0, 3, 7),
        (7, 0.0, 3, 0),
        (7, 1, 0, 7),
    ],
)
def test_keep_count(n, ratio, keep_last, expected):
    assert keep_count(n, ratio, keep_last) == expected
    for dtype in (torch.int32, torch.int64):
        counts = keep_count(torch.tensor([n, n], dtype=dtype), ratio, keep_last)
        assert counts.dtype == torch.int32
        assert counts.tolist() == [expected, expected]


@given(n=st.integers(0, 10**6), ratio=st.floats(0, 1), keep_last=st.integers(0, 10))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_keep_count_is_one_function_for_ints_and_tensors(n, ratio, keep_last):
    count = keep_count(n, ratio, keep_last)
    assert 0 <= count <= n
    assert keep_count(torch.tensor(n), ratio, keep_last).item() == count


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3.0, 0.5), TypeError, ["n_valid", "float", "int"]),
        ((torch.ones(2), 0.5), TypeError, ["n_valid", "float32", "int32"]),
        ((3, 1.5), ValueError, ["keep_ratio", "1.5", "0 to 1"]),
        ((3, math.nan), ValueError, ["keep_ratio", "nan", "0 to 1"]),
        ((3, 0.5, -1), ValueError, ["keep_last", "-1"]),
    ],
)
def test_keep_count_errors_name_the_argument(arguments, error, words):
    with pytest.raises(error) as raised:
        keep_count(*arguments)
    for word in words:
        assert word in str(raised.value)
