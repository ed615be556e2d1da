"""select_tokens with a threshold on a batch, and into the caller's memory: both backends against a plain filter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_kernels import select_tokens
from orthorank_kernels.ops.selection import Selection
from tests.orthorank_kernels.selections import (
    BACKENDS,
    INF,
    NAN,
    assert_selects,
    assert_selects_packed,
    bounds,
    by_filter,
    by_sort,
    float32,
    int32,
    random,
    split,
)
from tests.orthorank_kernels.tools import DEVICE, set_settings


@pytest.mark.parametrize("tokens", [1, 63, 1000, 2048, 4097, 8193])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selects_all_below(backend, tokens, poisoned):
    scores = random(2, tokens).abs()
    for threshold in (0.0, 0.5, 9.0):
        expected = [by_filter(row, threshold) for row in scores.tolist()]
        assert_selects(select_tokens(scores, threshold=threshold, backend=backend), expected, tokens)


@pytest.mark.parametrize("threshold", [0.0, -0.0, 1.0, 1.0 + 2.0**-23, -INF, INF, NAN, 1e-45, 3.4028235e38])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_score_equal_to_the_threshold_stays_and_nan_too(backend, threshold, poisoned):
    row = [9.0, 0.0, -0.0, 1.0, 1.0 + 2.0**-23, NAN, INF, -INF, 1e-45, -1e-45, 3.4028235e38]
    scores, each = torch.tensor([row], device=DEVICE), float32(threshold)
    for last in (0, 1, 4, 11, 40):
        expected = [by_filter(row, threshold, last=last)]
        assert_selects(select_tokens(scores, threshold=each, keep_last=last, backend=backend), expected, 11)
        if abs(threshold) < INF:
            actual = select_tokens(scores, threshold=threshold, keep_last=last, backend=backend)
            assert_selects(actual, expected, 11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_number_is_rounded_to_the_scores_dtype(backend):
    """So a score equals the threshold that it was written down as."""
    scores = float32(5.0, 0.1, 2.0).unsqueeze(0)
    for threshold, expected in (
        (0.1, []),
        (0.1 + 1e-12, []),
        (0.1 + 1e-7, [1]),
        (1e300, [1, 2]),
        (-1e300, []),
        (3, [1, 2]),
    ):
        actual = select_tokens(scores, threshold=threshold, backend=backend)
        assert_selects(actual, [expected], 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_sinks_and_a_threshold_for_each_row(backend, poisoned):
    scores = random(6, 40)
    ranges = [(0, 40), (7, 33), (0, 21), (39, 1), (40, 0), (38, 9)]
    for i, (start, length) in enumerate(ranges):
        scores[i, :start], scores[i, start + length :] = -INF, -INF
    starts, lengths = int32(*(s for s, _ in ranges)), int32(*(n for _, n in ranges))
    thresholds, sinks = [0.0, 1.0, -1.0, 5.0, 5.0, 5.0], [3, 39, -1, -1, 40, 38]
    actual = select_tokens(
        scores,
        threshold=float32(*thresholds),
        starts=starts,
        lengths=lengths,
        sink_positions=int32(*sinks),
        keep_last=2,
        backend=backend,
    )
    rows = zip(scores.tolist(), thresholds, ranges, sinks, strict=True)
    assert_selects(actual, [by_filter(row, t, s, n, sink, 2) for row, t, (s, n), sink in rows], 40)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_room_keeps_the_lowest_positions(backend, poisoned):
    scores = random(2, 30)
    for width in (0, 1, 7, 30, 300):
        expected = [by_filter(row, 0.3)[:width] for row in scores.tolist()]
        assert_selects(select_tokens(scores, threshold=0.3, max_selected=width, backend=backend), expected, width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_token_is_chosen_alone(backend):
    """What makes the choice causal: the same for any chunks of a prompt, and whatever else is in the batch."""
    scores = random(1, 50)
    whole = select_tokens(scores, threshold=0.2, sink_positions=int32(-1), backend=backend).positions
    chunks = []
    for start, end in ((0, 13), (13, 14), (14, 50)):
        part = select_tokens(scores[:, start:end], threshold=0.2, sink_positions=int32(-1), backend=backend).positions
        chunks += [start + p for p in part[0].tolist() if p >= 0]
    assert chunks == [p for p in whole[0].tolist() if p >= 0]


def test_long_rows_take_several_tiles(monkeypatch, poisoned):
    set_settings(monkeypatch, "select_tokens", tokens=16)
    for tokens in (15, 16, 17, 70):
        scores = random(3, tokens + 2)[:, 1:-1]  # rows begin off the alignment
        for width in (5, tokens):
            expected = [by_filter(row, 0.5, last=3)[:width] for row in scores.tolist()]
            actual = select_tokens(scores, threshold=0.5, keep_last=3, max_selected=width, backend="triton")
            assert_selects(actual, expected, width)


@st.composite
def selections(draw):
    tokens = draw(st.integers(1, 24))
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    score = st.one_of(floats, st.sampled_from([0.0, -0.0, 1.0, INF, -INF]))
    row = draw(st.lists(score, min_size=tokens, max_size=tokens))
    start = draw(st.integers(0, tokens))
    length = draw(st.integers(0, tokens - start))
    sink = draw(st.one_of(st.none(), st.integers(-1, tokens - 1)))
    threshold = draw(st.one_of(floats, st.sampled_from(row)))
    return row, threshold, start, length, sink, draw(st.integers(0, tokens)), draw(st.integers(0, tokens + 2))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=selections())
def test_any_scores_any_threshold(backend, case):
    row, threshold, start, length, sink, last, width = case
    actual = select_tokens(
        float32(*row).unsqueeze(0),
        threshold=float32(threshold),
        starts=int32(start),
        lengths=int32(length),
        sink_positions=None if sink is None else int32(sink),
        keep_last=last,
        max_selected=width,
        backend=backend,
    )
    assert_selects(actual, [by_filter(row, threshold, start, length, sink, last)[:width]], width)


def filled(*shape: int) -> torch.Tensor:
    return torch.full(shape, 77, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_out_is_written_and_returned(backend):
    scores, lengths = random(2, 9), [4, 0, 14]
    for request, pick in (({"k": 3}, by_sort), ({"threshold": 0.3}, by_filter)):
        for width, more in ((7, {}), (2, {}), (7, {"max_selected": 7})):
            out = Selection(filled(2, width), filled(2), None, None)
            actual = select_tokens(scores, **request, **more, out=out, backend=backend)
            assert actual.positions is out.positions
            assert actual.counts is out.counts
            rows = scores.tolist()
            if "k" in request:
                assert_selects(actual, [pick(row, min(3, width)) for row in rows], width)
            else:
                assert_selects(actual, [pick(row, 0.3)[:width] for row in rows], width)
        out = Selection(filled(20), filled(3), filled(20), filled(4))
        actual = select_tokens(scores.flatten(), **request, cu_seqlens=bounds(lengths), out=out, backend=backend)
        assert all(one is other for one, other in zip(actual, out, strict=True))
        rows = split(scores.flatten().tolist(), lengths)
        assert_selects_packed(actual, [pick(row, *request.values()) for row in rows], lengths, 20)


def test_operator_with_out_passes_opcheck():
    op = torch.ops.orthorank_kernels.select_tokens_out.default
    batch = (None,) * 5
    out = {"positions": filled(2, 4), "counts": filled(2), "rows": None, "cu_selected": None}
    torch.library.opcheck(op, (random(2, 9), 3, None, None, None, 4, *batch, 0), out)
    packed = (None, None, None, int32(0, 4, 9), None, 0)
    out = {"positions": filled(4), "counts": filled(2), "rows": filled(4), "cu_selected": filled(3)}
    torch.library.opcheck(op, (random(9), None, None, 0.5, None, 4, *packed), out)


@pytest.mark.parametrize("tokens", [100_003, pytest.param(1_000_003, marks=pytest.mark.slow)])
def test_very_many_tokens_are_streamed(tokens, poisoned):
    lengths = [tokens // 3, 3, tokens - 3 - tokens // 3]
    scores = random(tokens).mul(1000).round()
    order = (scores.double() + torch.arange(tokens, device=DEVICE) * 2.0**-30)[1:].argsort() + 1  # the sink is left out
    k = tokens // 3
    actual = select_tokens(scores.unsqueeze(0), k, backend="triton")
    assert actual.counts.tolist() == [k]
    assert torch.equal(actual.positions[0].long(), order[:k].sort().values)
    arguments = {"threshold": 10.0, "cu_seqlens": bounds(lengths), "max_selected": 2 * k}
    actual = select_tokens(scores, **arguments, backend="triton")
    for one, other in zip(actual, select_tokens(scores, **arguments, backend="torch"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"threshold": None}, ValueError, ["neither k nor threshold"]),
        ({"k": 1}, ValueError, ["k and threshold", "both"]),
        ({"threshold": "low"}, TypeError, ["threshold", "'low'", "number"]),
        ({"threshold": True}, TypeError, ["threshold", "True", "number"]),
        ({"threshold": NAN}, ValueError, ["threshold", "nan"]),
        ({"threshold": torch.ones(2).double()}, TypeError, ["threshold", "float64", "float32"]),
        ({"threshold": torch.ones(3)}, ValueError, ["threshold", "[3]", "[2]"]),
        ({"threshold": torch.ones(1).expand(2)}, ValueError, ["threshold", "strides [0]"]),
        ({"threshold": torch.ones(2, device="meta")}, ValueError, ["threshold", "meta", "cpu"]),
        ({"position_offsets": torch.ones(2, dtype=torch.int32)}, ValueError, ["position_offsets", "cu_seqlens"]),
        ({"out": torch.ones(2)}, TypeError, ["out", "Tensor", "positions, counts, rows, cu_selected"]),
        ({"out": (torch.ones(2, 3), None, None, None)}, TypeError, ["out.positions", "float32", "int32"]),
        ({"out": (int32(1, 2), None, None, None)}, ValueError, ["out.positions", "[2]", "2, 2"]),
        ({"out": (filled(2, 3), filled(3), None, None)}, ValueError, ["out.counts", "[3]", "[2]"]),
        ({"out": (filled(2, 3), filled(2), filled(3), None)}, ValueError, ["out.rows", "batch", "None"]),
        ({"out": (filled(2, 3), filled(2), None, None), "max_selected": 4}, ValueError, ["out.positions", "[2, 4]"]),
        ({"out": (filled(2, 6)[:, ::2], filled(2), None, None)}, ValueError, ["out.positions", "strides"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"scores": torch.ones(2, 3), "threshold": 1.0} | change
    with pytest.raises(error) as raised:
        select_tokens(**arguments)
    for word in words:
        assert word in str(raised.value)
