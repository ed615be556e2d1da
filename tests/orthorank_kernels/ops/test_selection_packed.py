"""select_tokens on packed sequences, by k and by threshold: both backends against a Python sort and a filter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from orthorank_kernels import keep_count, select_tokens
from orthorank_kernels.dispatch import interpreting
from orthorank_kernels.pytorch import selection as pytorch
from orthorank_kernels.triton import packing
from tests.orthorank_kernels.selections import (
    BACKENDS,
    INF,
    NAN,
    assert_selects_packed,
    bounds,
    by_filter,
    by_sort,
    float32,
    int32,
    random,
    shuffled,
    split,
)
from tests.orthorank_kernels.tools import DEVICE, set_settings

LENGTHS = [0, 5, 1, 0, 0, 40, 3, 21, 0]


@pytest.fixture
def small_tiles(monkeypatch):
    """Sequences of more than 16 tokens are streamed, in tiles of 16; thresholds take tiles of 16."""
    set_settings(monkeypatch, "select_tokens", {"short rows": {"tokens": 8}}, tokens=16)


def k_of_each(lengths: list[int]) -> list[int]:
    return [(i * 7 + 3) % (n + 2) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("lengths", [LENGTHS, [7], [0], [0, 0, 4], [4, 0, 0], [1, 2] * 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_k_smallest_of_each_sequence(backend, lengths, poisoned):
    scores = random(sum(lengths)).mul(4).round()  # with ties
    rows = split(scores.tolist(), lengths)
    for k in (k_of_each(lengths), [sum(lengths)] * len(lengths)):
        actual = select_tokens(scores, int32(*k), cu_seqlens=bounds(lengths), backend=backend)
        expected = [by_sort(row, n) for row, n in zip(rows, k, strict=True)]
        assert_selects_packed(actual, expected, lengths, sum(lengths))
    actual = select_tokens(scores, min(2, sum(lengths)), cu_seqlens=bounds(lengths), backend=backend)
    assert_selects_packed(actual, [by_sort(row, 2) for row in rows], lengths, sum(lengths))


@pytest.mark.parametrize("lengths", [LENGTHS, [7], [0], [0, 0, 4], [4, 0, 0], [1] * 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_below_a_threshold(backend, lengths, poisoned):
    scores = random(sum(lengths)).mul(4).round()
    rows = split(scores.tolist(), lengths)
    actual = select_tokens(scores, threshold=1.0, keep_last=1, cu_seqlens=bounds(lengths), backend=backend)
    assert_selects_packed(actual, [by_filter(row, 1.0, last=1) for row in rows], lengths, sum(lengths))
    each = [float(i % 3) for i in range(len(lengths))]
    actual = select_tokens(scores, threshold=float32(*each), cu_seqlens=bounds(lengths), backend=backend)
    expected = [by_filter(row, t) for row, t in zip(rows, each, strict=True)]
    assert_selects_packed(actual, expected, lengths, sum(lengths))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sequence_alone_selects_what_it_selects_in_a_batch(backend, poisoned):
    scores, lengths = random(3, 20), [20, 13, 20]
    packed = torch.cat([row[:n] for row, n in zip(scores, lengths, strict=True)])
    for request in ({"k": 6}, {"threshold": 0.2}):
        batch = select_tokens(scores, lengths=int32(*lengths), **request, backend=backend)
        actual = select_tokens(packed, cu_seqlens=bounds(lengths), **request, backend=backend)
        assert actual.counts.tolist() == batch.counts.tolist()
        assert actual.positions[actual.positions >= 0].tolist() == batch.positions[batch.positions >= 0].tolist()


@pytest.mark.parametrize("request_", [{"k": 3}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_go_on_where_cached_tokens_end(backend, request_, poisoned):
    """Without the first tokens of a prompt, its sink is not here; where it is, it can be named."""
    lengths, offsets = [6, 6, 0, 6, 6], [0, 100, 7, 0, 2**30]
    scores = random(24)
    rows = split(scores.tolist(), lengths)

    def expected(sinks):
        pick = by_filter if "threshold" in request_ else by_sort
        return [pick(row, *request_.values(), sink=s, last=1) for row, s in zip(rows, sinks, strict=True)]

    arguments = {"cu_seqlens": bounds(lengths), "position_offsets": int32(*offsets), "keep_last": 1, **request_}
    actual = select_tokens(scores, **arguments, backend=backend)
    assert_selects_packed(actual, expected([0, -1, -1, 0, -1]), lengths, 24, offsets)
    named = int32(5, 3, 0, -1, -(2**31))
    actual = select_tokens(scores, **arguments, sink_positions=named, backend=backend)
    assert_selects_packed(actual, expected([5, 3, 0, -1, -1]), lengths, 24, offsets)
    beyond = int32(6, -1, -1, 7, 2**31 - 1)  # of the next sequences, or of none
    actual = select_tokens(scores, **arguments, sink_positions=beyond, backend=backend)
    assert_selects_packed(actual, expected([-1] * 5), lengths, 24, offsets)


@pytest.mark.parametrize("width", [0, 1, 5, 11, 12, 24, 300, 600])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_room_serves_the_first_sequences(backend, width, poisoned):
    lengths, scores = [6, 0, 12, 6], random(24)
    rows = split(scores.tolist(), lengths)
    room, expected = width, []
    for row in rows:  # a sequence cut short takes fewer of the smallest
        expected.append(by_sort(row, min(room, 4)))
        room -= len(expected[-1])
    actual = select_tokens(scores, 4, cu_seqlens=bounds(lengths), max_selected=width, backend=backend)
    assert_selects_packed(actual, expected, lengths, width)

    room, expected = width, []
    for row in rows:  # or the lowest positions
        expected.append(by_filter(row, 0.5)[:room])
        room -= len(expected[-1])
    actual = select_tokens(scores, threshold=0.5, cu_seqlens=bounds(lengths), max_selected=width, backend=backend)
    assert_selects_packed(actual, expected, lengths, width)


@pytest.mark.parametrize("request_", [{"k": 2}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_past_the_last_sequence_belong_to_none(backend, request_, poisoned):
    """As in a captured graph, whose buffers are larger than most batches."""
    scores = torch.cat([random(9), torch.full((5,), -INF, device=DEVICE)])
    lengths = [4, 0, 5]
    actual = select_tokens(scores, cu_seqlens=bounds(lengths), **request_, keep_last=1, backend=backend)
    pick = by_filter if "threshold" in request_ else by_sort
    rows = split(scores.tolist(), lengths)
    assert_selects_packed(actual, [pick(row, *request_.values(), last=1) for row in rows], lengths, 14)


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_empty_inputs(backend, poisoned):
    for request in ({"k": 0}, {"threshold": 1.0}):
        for lengths in ([], [0], [0, 0]):
            actual = select_tokens(random(0), **request, cu_seqlens=bounds(lengths), max_selected=3, backend=backend)
            assert_selects_packed(actual, [[] for _ in lengths], lengths, 3)
        actual = select_tokens(random(4), **request, cu_seqlens=bounds([]), backend=backend)
        assert_selects_packed(actual, [], [], 4)


@pytest.mark.parametrize("step", [256, 2])
def test_long_sequences_are_streamed_and_many_taken_in_steps(step, small_tiles, monkeypatch, poisoned):
    if step != 256 and not interpreting():
        pytest.skip("a compiled kernel keeps the constants that it was compiled with")
    monkeypatch.setattr(packing, "SEQUENCES", step)
    lengths = [3, 70, 0, 16, 13, 17, 1, 1, 1, 1, 1, 1, 33, 0]
    scores = random(sum(lengths)).mul(4).round()
    rows, k = split(scores.tolist(), lengths), k_of_each(lengths)
    arguments = {"cu_seqlens": bounds(lengths), "keep_last": 2, "backend": "triton"}
    actual = select_tokens(scores, int32(*k), **arguments)
    expected = [by_sort(row, n, last=2) for row, n in zip(rows, k, strict=True)]
    assert_selects_packed(actual, expected, lengths, len(scores))
    actual = select_tokens(scores, threshold=0.5, **arguments)
    assert_selects_packed(actual, [by_filter(row, 0.5, last=2) for row in rows], lengths, len(scores))


@pytest.mark.skipif(not interpreting(), reason="only the interpreter lets a test choose the order of programs")
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_programs_gives_the_same(seed, monkeypatch, poisoned):
    from triton.runtime.interpreter import interpreter_builder

    scores, k = random(sum(LENGTHS)), k_of_each(LENGTHS)
    order, set_index = shuffled(len(LENGTHS), seed), interpreter_builder.set_grid_idx
    visited = []

    def permuted(x, y, z):
        visited.append(order[x])
        set_index(order[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)
    actual = select_tokens(scores, int32(*k), cu_seqlens=bounds(LENGTHS), backend="triton")
    assert visited == order
    expected = [by_sort(row, n) for row, n in zip(split(scores.tolist(), LENGTHS), k, strict=True)]
    assert_selects_packed(actual, expected, LENGTHS, len(scores))


@st.composite
def packed_selections(draw):
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    floats = st.floats(width=32, allow_nan=True, allow_infinity=True)
    common = st.sampled_from([0.0, -0.0, 1.0, INF, -INF, NAN])
    row = draw(st.lists(st.one_of(floats, common), min_size=sum(lengths), max_size=sum(lengths)))
    a_score = st.one_of(floats, common, *([st.sampled_from(row)] if row else []))

    def one_for_each(values):
        return draw(st.lists(values, min_size=len(lengths), max_size=len(lengths)))

    k, threshold = one_for_each(st.integers(-2, 12)), one_for_each(a_score)
    sinks = draw(st.one_of(st.none(), st.just(one_for_each(st.integers(-1, 9)))))
    offsets = draw(st.one_of(st.none(), st.just(one_for_each(st.integers(0, 2)))))
    return lengths, row, k, threshold, sinks, offsets, draw(st.integers(0, 5)), draw(st.integers(0, 60))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=packed_selections())
def test_any_scores_any_split(backend, case):
    lengths, row, k, threshold, sinks, offsets, last, width = case
    arguments = {
        "cu_seqlens": bounds(lengths),
        "sink_positions": None if sinks is None else int32(*sinks),
        "position_offsets": None if offsets is None else int32(*offsets),
        "keep_last": last,
        "max_selected": width,
        "backend": backend,
    }
    there = sinks if sinks is not None else [0 if o == 0 else -1 for o in offsets or [0] * len(lengths)]
    smallest, below, room, left = [], [], width, width
    for i, part in enumerate(split(row, lengths)):
        smallest.append(by_sort(part, max(0, min(k[i], room)), sink=there[i], last=last))
        below.append(by_filter(part, threshold[i], sink=there[i], last=last)[:left])
        room, left = room - len(smallest[-1]), left - len(below[-1])
    scores = float32(*row)
    assert_selects_packed(select_tokens(scores, int32(*k), **arguments), smallest, lengths, width, offsets)
    actual = select_tokens(scores, threshold=float32(*threshold), **arguments)
    assert_selects_packed(actual, below, lengths, width, offsets)


def test_pytorch_reads_no_value_on_the_host():
    with FakeTensorMode():
        scores, each = torch.empty(50), torch.empty(3, dtype=torch.int32)
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        for which in ((50, each, None, None), (None, None, 0.5, None)):
            positions, counts, rows, cu_selected = pytorch.select_tokens(
                scores, *which, 40, None, None, each, cu_seqlens, each, 2
            )
            assert [list(t.shape) for t in (positions, counts, rows, cu_selected)] == [[40], [3], [40], [4]]


def test_operator_passes_opcheck():
    op = torch.ops.orthorank_kernels.select_tokens.default
    each, cu_seqlens = int32(3, 1), int32(0, 4, 9)
    packed = (None, None, int32(0, -1), cu_seqlens, int32(0, 2), 1)
    torch.library.opcheck(op, (random(9), 9, each, None, None, 7, *packed))
    torch.library.opcheck(op, (random(9), None, None, None, float32(0.0, 1.0), 7, *packed))


def test_compiles_as_one_graph():
    def select(scores, cu_seqlens):
        k = keep_count(cu_seqlens.diff(), 0.4)
        picked = select_tokens(scores, k, cu_seqlens=cu_seqlens)
        return *picked, *select_tokens(scores, threshold=0.5, cu_seqlens=cu_seqlens, max_selected=8)

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager", dynamic=True)
    for lengths in ([12, 3, 5], [7, 8]):
        scores, cu_seqlens = random(sum(lengths)), bounds(lengths)
        for one, other in zip(compiled(scores, cu_seqlens), select(scores, cu_seqlens), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"scores": torch.ones(2, 3)}, ValueError, ["scores", "[2, 3]", "[total]"]),
        ({"cu_seqlens": torch.ones(2)}, TypeError, ["cu_seqlens", "float32", "int32"]),
        ({"cu_seqlens": torch.ones(0, dtype=torch.int32)}, ValueError, ["cu_seqlens", "[0]", "seqs + 1"]),
        ({"cu_seqlens": torch.ones(6, dtype=torch.int32)[::2]}, ValueError, ["cu_seqlens", "strides [2]"]),
        ({"cu_seqlens": torch.ones(3, dtype=torch.int32, device="meta")}, ValueError, ["cu_seqlens", "meta", "cpu"]),
        ({"starts": torch.ones(2, dtype=torch.int32)}, ValueError, ["starts", "cu_seqlens"]),
        ({"lengths": torch.ones(2, dtype=torch.int32)}, ValueError, ["lengths", "cu_seqlens"]),
        ({"sink_positions": torch.ones(3, dtype=torch.int32)}, ValueError, ["sink_positions", "[3]", "[2]"]),
        ({"position_offsets": torch.ones(2)}, TypeError, ["position_offsets", "float32", "int32"]),
        ({"position_offsets": int32(2**31 - 1, 0)}, ValueError, ["position_offsets[0] is 2147483647", "2 tokens"]),
        ({"position_offsets": int32(0, -1)}, ValueError, ["position_offsets[1] is -1", "from 0"]),
        ({"k": torch.ones(3, dtype=torch.int32)}, ValueError, ["k", "[3]", "[2]"]),
        ({"k": 4}, ValueError, ["k is 4", "tokens, 3"]),
        ({"out": (int32(0, 0, 0),) * 2}, TypeError, ["out", "positions, counts, rows, cu_selected"]),
        ({"out": (int32(0, 0, 0), int32(0, 0), None, int32(0, 0, 0))}, TypeError, ["out.rows", " is None; it must be"]),
        ({"out": (int32(0, 0), int32(0, 0), int32(0), int32(0, 0, 0))}, ValueError, ["out.rows", "[1]", "[2]"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"scores": torch.ones(3), "k": 1, "cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32)} | change
    with pytest.raises(error) as raised:
        select_tokens(**arguments)
    for word in words:
        assert word in str(raised.value)
