"""select_tokens with k on a batch: both backends against a Python sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from orthorank_kernels import keep_count, select_tokens
from orthorank_kernels.dispatch import interpreting
from orthorank_kernels.pytorch import selection as pytorch
from orthorank_kernels.triton import radix
from tests.orthorank_kernels.selections import BACKENDS, INF, NAN, assert_selects, by_sort, int32, random
from tests.orthorank_kernels.tools import DEVICE, set_settings


@pytest.mark.parametrize("tokens", [1, 63, 127, 1000, 2048, 4097, 8192, 8193])
@pytest.mark.parametrize("backend", BACKENDS)
def test_selects_the_k_smallest(backend, tokens, poisoned):
    scores = random(2, tokens).abs()
    for k in sorted({0, 1, tokens // 3, tokens - 1, tokens}):
        expected = [by_sort(row, k) for row in scores.tolist()]
        assert_selects(select_tokens(scores, k, backend=backend), expected, k)


@pytest.mark.parametrize(
    "row",
    [
        [5.0] * 40,
        [0.0, -0.0] * 20,
        [1.0, 2.0, 2.0, 2.0, 1.0, 2.0],
        [NAN] * 9,
        [0.0, NAN, INF, -INF, 1.0, NAN, INF, -1.0, -0.0, 0.0],
        [0.0, -NAN, 3.4028235e38, -3.4028235e38, 1e-45, -1e-45, 0.0, 1.17549435e-38],
        [1.0 + i * 2.0**-23 for i in range(70)],
    ],
    ids=["equal", "zeros", "ties", "nan", "specials", "extremes", "neighbours"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_and_special_values(backend, row, poisoned):
    scores = torch.tensor([row, row[::-1]], device=DEVICE)
    for k in range(0, len(row) + 1, 1 + len(row) // 12):
        expected = [by_sort(r, k) for r in scores.tolist()]
        assert_selects(select_tokens(scores, k, backend=backend), expected, k)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sink_comes_last_of_all(backend):
    scores = torch.tensor([[-INF, NAN, 3.0, NAN]], device=DEVICE)
    assert select_tokens(scores, 3, backend=backend)[0].tolist() == [[1, 2, 3]]
    assert select_tokens(scores, 3, sink_positions=int32(2), backend=backend)[0].tolist() == [[0, 1, 3]]
    assert select_tokens(scores, 1, sink_positions=int32(-1), backend=backend)[0].tolist() == [[0]]
    assert select_tokens(scores, 4, backend=backend)[0].tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_is_never_selected_and_a_row_alone_selects_the_same(backend, poisoned):
    tokens = 40
    ranges = [(0, 40), (7, 33), (0, 21), (9, 13), (39, 1), (40, 0), (3, 0), (1, 1)]
    scores = random(len(ranges), tokens)
    for i, (start, length) in enumerate(ranges):
        scores[i, :start], scores[i, start + length :] = -INF, -INF
    starts, lengths = int32(*(s for s, _ in ranges)), int32(*(n for _, n in ranges))
    for k in (0, 1, 12, 40):
        actual = select_tokens(scores, k, starts=starts, lengths=lengths, backend=backend)
        rows = zip(scores.tolist(), ranges, strict=True)
        assert_selects(actual, [by_sort(row, k, start, length) for row, (start, length) in rows], k)
        alone = select_tokens(scores[3:4, 9:22], min(k, 13), backend=backend)[0]
        assert [p + 9 for p in alone[0].tolist() if p >= 0] == [p for p in actual[0][3].tolist() if p >= 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_range_that_leaves_the_row_is_cut_to_it(backend, poisoned):
    scores = random(5, 10)
    actual = select_tokens(
        scores,
        10,
        starts=int32(-3, 4, 12, 6, 2**31 - 1),
        lengths=int32(4, 2**31 - 1, 3, -2, 2**31 - 1),
        sink_positions=int32(-1, -1, -1, -1, -(2**31)),
        backend=backend,
    )
    assert_selects(actual, [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9], [], [], []], 10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_keep_last_forces_the_last_tokens(backend):
    scores = torch.tensor([[0.0, 9.0, -INF, 1.0, NAN, INF]], device=DEVICE)
    for keep_last in (0, 1, 2, 5, 6, 100, 2**23):
        for k in range(7):
            expected = by_sort(scores[0].tolist(), k, last=keep_last)
            assert_selects(select_tokens(scores, k, keep_last=keep_last, backend=backend), [expected], k)
    padded = select_tokens(scores, 2, starts=int32(1), lengths=int32(4), keep_last=1, backend=backend)
    assert padded[0].tolist() == [[2, 4]]
    sink_is_last = select_tokens(scores, 1, sink_positions=int32(5), keep_last=2, backend=backend)
    assert sink_is_last[0].tolist() == [[4]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_k_for_each_row(backend, dtype, poisoned):
    scores = random(5, 30)
    wanted = [3, -7, 99, 0, 30]
    k = torch.tensor(wanted, dtype=dtype, device=DEVICE)
    expected = [by_sort(row, max(0, n)) for row, n in zip(scores.tolist(), wanted, strict=True)]
    assert_selects(select_tokens(scores, k, backend=backend), expected, 30)
    narrow = [by_sort(row, max(0, min(n, 4))) for row, n in zip(scores.tolist(), wanted, strict=True)]
    assert_selects(select_tokens(scores, k, max_selected=4, backend=backend), narrow, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_max_selected_sets_the_width_and_bounds_k(backend, poisoned):
    scores = random(2, 20)
    for k, width in ((5, 5), (5, 3), (5, 600), (0, 7), (20, 0)):
        expected = [by_sort(row, min(k, width)) for row in scores.tolist()]
        assert_selects(select_tokens(scores, k, max_selected=width, backend=backend), expected, width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, poisoned):
    for offset in range(5):
        scores = random(6, 50)[::2, offset : offset + 37]
        starts = int32(offset, 1, 2)
        expected = [by_sort(row, 11, start) for row, start in zip(scores.tolist(), starts.tolist(), strict=True)]
        assert_selects(select_tokens(scores, 11, starts=starts, backend=backend), expected, 11)


def test_rows_longer_than_the_registers_are_streamed(monkeypatch, poisoned):
    kinds = {"short rows": {"tokens": 4}, "long rows": {"tokens": 8}, "streamed rows": {"tokens": 32}}
    set_settings(monkeypatch, "select_tokens", kinds)
    for tokens in (9, 32, 33, 65, 127):
        scores = random(2, tokens).mul(4).round()  # many ties, also between tiles
        starts, lengths = int32(0, 3), int32(tokens, tokens - 5)
        for k in (0, tokens // 3, tokens - 6):
            actual = select_tokens(scores, k, starts=starts, lengths=lengths, keep_last=2, backend="triton")
            expected = [by_sort(scores[0].tolist(), k, last=2), by_sort(scores[1].tolist(), k, 3, tokens - 5, last=2)]
            assert_selects(actual, expected, k)


@pytest.mark.skipif(not interpreting(), reason="a compiled kernel keeps the constants that it was compiled with")
def test_counting_without_a_histogram_mask(monkeypatch, poisoned):
    """As with Triton before 3.4."""
    monkeypatch.setattr(radix, "MASKED_HISTOGRAM", False)
    set_settings(monkeypatch, "select_tokens", {"streamed rows": {"tokens": 32}}, tokens=64)
    for tokens in (60, 64, 127):
        scores = random(2, tokens).mul(8).round()
        for k in (1, tokens // 3, tokens - 1):
            expected = [by_sort(row, k) for row in scores.tolist()]
            assert_selects(select_tokens(scores, k, backend="triton"), expected, k)


@pytest.mark.parametrize("tokens", [13, 14, 15, 16])
def test_a_row_off_the_alignment_fits_its_block(tokens, monkeypatch, poisoned):
    set_settings(monkeypatch, "select_tokens", tokens=16)
    scores = random(4, tokens)
    for start in range(4):
        actual = select_tokens(scores, tokens, starts=int32(*[start] * 4), backend="triton")
        assert_selects(actual, [list(range(start, tokens))] * 4, tokens)


@st.composite
def selections(draw):
    tokens = draw(st.integers(1, 24))
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    score = st.one_of(floats, st.sampled_from([0.0, -0.0, 1.0, INF, -INF]))
    row = draw(st.lists(score, min_size=tokens, max_size=tokens))
    start = draw(st.integers(0, tokens))
    length = draw(st.integers(0, tokens - start))
    sink = draw(st.one_of(st.none(), st.integers(-1, tokens - 1)))
    return row, draw(st.integers(0, tokens)), start, length, sink, draw(st.integers(0, tokens))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(case=selections())
def test_any_scores_any_k(backend, case):
    row, k, start, length, sink, last = case
    actual = select_tokens(
        torch.tensor([row], dtype=torch.float32, device=DEVICE),
        k,
        starts=int32(start),
        lengths=int32(length),
        sink_positions=None if sink is None else int32(sink),
        keep_last=last,
        backend=backend,
    )
    assert_selects(actual, [by_sort(row, k, start, length, sink, last)], k)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_empty_inputs(backend, poisoned):
    assert list(select_tokens(random(0, 5), 2, backend=backend)[0].shape) == [0, 2]
    assert_selects(select_tokens(random(2, 0), 0, backend=backend), [[], []], 0)
    assert_selects(select_tokens(random(2, 0), 0, max_selected=3, backend=backend), [[], []], 3)
    assert list(select_tokens(random(0, 0), 0, backend=backend)[1].shape) == [0]


def test_scores_that_require_grad_are_selected_from():
    scores = random(1, 6).requires_grad_()
    positions = select_tokens(scores, 2).positions
    assert positions.tolist() == [by_sort(scores[0].tolist(), 2)]


def test_pytorch_reads_no_value_on_the_host():
    with FakeTensorMode():
        scores, one = torch.empty(3, 50), torch.empty(3, dtype=torch.int32)
        positions, counts, _, _ = pytorch.select_tokens(scores, 50, one, None, None, 50, one, one, one, None, None, 2)
        assert list(positions.shape) == [3, 50]
        assert list(counts.shape) == [3]


@pytest.mark.parametrize("keep_last", [0, 1])
def test_operator_passes_opcheck(keep_last):
    op = torch.ops.orthorank_kernels.select_tokens.default
    nothing = (None,) * 5
    torch.library.opcheck(op, (random(2, 9), 3, None, None, None, 3, *nothing, keep_last))
    k, rows = torch.tensor([2, 50], device=DEVICE), (int32(0, 2), int32(9, 4), int32(-1, 3), None, None)
    torch.library.opcheck(op, (random(2, 9), 9, k, None, None, 12, *rows, keep_last))
    torch.library.opcheck(op, (random(2, 9), None, None, 0.5, None, 12, *rows, keep_last))


def test_compiles_as_one_graph():
    def select(scores, lengths):
        k = keep_count(lengths, 0.4, keep_last=1)
        return select_tokens(scores, k, lengths=lengths, keep_last=1), select_tokens(scores, scores.shape[1] // 2)

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 15):
        scores, lengths = random(2, tokens), int32(tokens, 10)
        assert str(compiled(scores, lengths)) == str(select(scores, lengths))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scores": torch.ones(3)}, ValueError, ["scores", "[3]", "[batch, tokens]"]),
        ({"scores": torch.ones(2, 3).half()}, TypeError, ["scores", "float16", "float32"]),
        ({"scores": torch.ones(3, 2).mT}, ValueError, ["scores", "strides", ".contiguous()"]),
        ({"k": 4}, ValueError, ["k is 4", "tokens, 3"]),
        ({"k": -1}, ValueError, ["k is -1", "0"]),
        ({"k": 1.5}, TypeError, ["k is a float", "int32"]),
        ({"k": torch.ones(2)}, TypeError, ["k", "float32", "int32"]),
        ({"k": torch.ones(3, dtype=torch.int32)}, ValueError, ["k", "[3]", "[2]"]),
        ({"k": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, ["k", "meta", "cpu"]),
        ({"starts": torch.ones(2, dtype=torch.int64)}, TypeError, ["starts", "int64", "int32"]),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, ValueError, ["lengths", "[3]", "[2]"]),
        ({"k": torch.ones(1, dtype=torch.int32).expand(2)}, ValueError, ["k", "strides [0]", ".contiguous()"]),
        ({"starts": torch.ones(2, 3, dtype=torch.int32)[:, 0]}, ValueError, ["starts", "strides [3]"]),
        ({"lengths": torch.ones(4, dtype=torch.int32)[::2]}, ValueError, ["lengths", "strides [2]"]),
        ({"sink_positions": torch.ones(1, dtype=torch.int32).expand(2)}, ValueError, ["sink_positions", "strides"]),
        ({"sink_positions": 0}, TypeError, ["sink_positions", "int", "tensor"]),
        ({"keep_last": -1}, ValueError, ["keep_last", "-1", "8388608"]),
        ({"keep_last": 2**23 + 1}, ValueError, ["keep_last", "8388609", "8388608"]),
        ({"max_selected": -2}, ValueError, ["max_selected", "-2", "None"]),
        ({"scores": torch.empty(1, 2**30 + 1, device="meta")}, ValueError, ["tokens", "positions"]),
        ({"backend": "fast"}, ValueError, ["backend", "'fast'", "'reference'"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"scores": torch.ones(2, 3), "k": 1} | change
    with pytest.raises(error) as raised:
        select_tokens(**arguments)
    for word in words:
        assert word in str(raised.value)
