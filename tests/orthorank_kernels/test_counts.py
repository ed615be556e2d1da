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


@given(
    n=st.integers(0, 10**6),
    ratio=st.floats(0, 1),
    keep_last=st.integers(0, 10),
    multiple=st.sampled_from([1, 2, 64, 128]),
    sink=st.booleans(),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_keep_count_is_one_function_for_ints_and_tensors(n, ratio, keep_last, multiple, sink):
    count = keep_count(n, ratio, keep_last, sink_inside=sink, multiple=multiple)
    assert 0 <= count <= n
    assert keep_count(torch.tensor(n), ratio, keep_last, sink_inside=sink, multiple=multiple).item() == count


@given(n=st.integers(1, 10**4), ratio=st.floats(0.01, 0.99), keep_last=st.integers(0, 10), sink=st.booleans())
@settings(max_examples=200, deadline=None, derandomize=True)
def test_a_multiple_is_reached_as_far_as_there_are_tokens_but_the_sink(n, ratio, keep_last, sink):
    at_least = keep_count(n, ratio, keep_last, sink_inside=sink)
    plain = keep_count(n, ratio, sink_inside=sink)
    rounded = -(-plain // 64) * 64
    assert keep_count(n, ratio, keep_last, sink_inside=sink, multiple=64) == min(n - sink, max(at_least, rounded))


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_a_multiple_changes_neither_removed_nor_dense_layers(ratio):
    assert keep_count(100, ratio, multiple=64) == keep_count(100, ratio)


@pytest.mark.parametrize("multiple", [0, -1, 1.0, True, "64"])
def test_an_illegal_multiple_is_refused(multiple):
    with pytest.raises((TypeError, ValueError), match="multiple"):
        keep_count(100, 0.5, multiple=multiple)


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
