"""select_tokens as an indexer of sparse attention uses it: the largest scores of many rows, against a Python sort."""

import math
import random as python_random
import struct

import pytest
import torch

from orthorank_kernels import select_tokens
from orthorank_kernels.dispatch import interpreting
from tests.orthorank_kernels.selections import BACKENDS, INF, int32, random
from tests.orthorank_kernels.tools import DEVICE

STARTS, LENGTHS = [0, 7, 0, 9, 39, 40, 3, 1], [40, 33, 21, 13, 1, 0, 0, 12]
NEGATIVE_NAN = struct.unpack("<f", struct.pack("<I", 0xFFC00001))[0]

SPECIAL = [math.nan, 1.0, NEGATIVE_NAN, -INF, INF, -0.0, 0.0, math.nan, -1.0]


def indexed(row: list[float], k: int, start: int = 0, length: int | None = None, relative: bool = False) -> list[int]:
    """Columns of the k largest, ascending; lower columns first at a tie, NaN behind all numbers; -1 past them."""
    columns = range(start, len(row) if length is None else min(len(row), start + length))
    best = sorted(columns, key=lambda i: (math.isnan(row[i]), 0.0 if math.isnan(row[i]) else -row[i], i))[:k]
    return [i - start if relative else i for i in sorted(best)] + [-1] * (k - len(best))


def assert_indexed(scores, k, backend, starts=None, lengths=None, relative=False):
    rows = scores.tolist()
    begins = [0] * len(rows) if starts is None else starts
    spans = [None] * len(rows) if lengths is None else lengths
    ranges = {name: int32(*x) for name, x in (("starts", starts), ("lengths", lengths)) if x is not None}
    chosen = select_tokens(scores, k, largest=True, relative=relative, backend=backend, **ranges)
    wanted = [indexed(row, k, a, n, relative) for row, a, n in zip(rows, begins, spans, strict=True)]
    assert chosen.positions.tolist() == wanted
    assert chosen.counts.tolist() == [sum(i >= 0 for i in row) for row in wanted]
    return chosen.positions


@pytest.mark.parametrize("tokens", [1, 63, 1000, 8193])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_k_largest(backend, tokens, poisoned):
    """Short rows, and rows that are streamed; k beyond the row is padded with -1."""
    for k in (tokens // 3, tokens + 5) if tokens > 8192 else (0, 1, tokens // 3, tokens, tokens + 5):
        assert_indexed(random(2, tokens), k, backend)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_with_starts_and_lengths_of_their_own(backend, relative, poisoned):
    """As a prefill of several requests has them, the empty row and the row shorter than k among them."""
    assert_indexed(random(8, 40), 16, backend, STARTS, LENGTHS, relative)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_k_for_each_row_and_a_view(backend):
    scores = random(3, 64)[:, 4:60]  # rows begin where the stride says
    chosen = select_tokens(scores, int32(3, 0, 99), max_selected=8, largest=True, backend=backend)
    assert chosen.positions.tolist() == [
        indexed(row, k) + [-1] * (8 - k) for row, k in zip(scores.tolist(), (3, 0, 8), strict=True)
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_scores_in_one_bucket_of_every_digit_but_the_last(backend):
    """What defeats a histogram of the leading bits alone."""
    bits = torch.tensor([python_random.Random(0).sample(range(0x3F800000, 0x3F800000 + 9000), 8500)])
    assert_indexed(bits.int().view(torch.float32).to(DEVICE), 2048, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_hundred_winners_and_equal_zeros(backend):
    """Of 8,220 zeros the first ones fill what is left of k."""
    row = [0.0] * 8320
    for i in python_random.Random(1).sample(range(8320), 100):
        row[i] = 1.0 + i / 8320
    positions = assert_indexed(torch.tensor([row], device=DEVICE), 2048, backend)
    assert {i for i, score in enumerate(row) if score} <= set(positions[0].tolist())


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_two_thousand_of_a_million(backend):
    """Against torch.topk, where no two scores are equal; the second row ends earlier."""
    scores = torch.randperm(2**20, generator=torch.Generator().manual_seed(3)).float().expand(2, -1).to(DEVICE)
    lengths = int32(2**20, 700_001)
    chosen = select_tokens(scores, 2048, lengths=lengths, largest=True, backend=backend).positions
    for row, length in enumerate(lengths.tolist()):
        assert torch.equal(chosen[row], scores[row, :length].topk(2048).indices.sort().values.int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_at_the_last_place_over_a_hundred_launches(backend):
    row = [2.0] * 20 + [1.0] * 200 + [0.5] * 36
    python_random.Random(2).shuffle(row)
    scores = torch.tensor([row], device=DEVICE)
    first = assert_indexed(scores, 64, backend)
    for _ in range(10 if backend == "triton" and interpreting() else 100):
        assert torch.equal(select_tokens(scores, 64, largest=True, backend=backend).positions, first)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_of_both_signs_comes_last(backend):
    """Behind -inf, by column; taken where nothing else is left."""
    bits = torch.tensor([SPECIAL]).view(torch.int32)
    assert bits[0, 0] > 0 > bits[0, 2]
    for k in range(len(SPECIAL) + 1):
        assert_indexed(torch.tensor([SPECIAL], device=DEVICE), k, backend)
    six = select_tokens(torch.tensor([SPECIAL], device=DEVICE), 6, largest=True, backend=backend)
    assert six.positions.tolist() == [[1, 3, 4, 5, 6, 8]]


def test_the_reference_says_the_same():
    assert_indexed(torch.tensor([SPECIAL], device=DEVICE), 7, "reference")
    for relative in (False, True):
        assert_indexed(random(8, 40), 16, "reference", STARTS, LENGTHS, relative)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forced_columns_and_a_sink(backend):
    """The last ones of a row where ``keep_last`` says so; one that ``sink_positions`` names comes last of all."""
    scores = torch.tensor([[9.0, 8.0, 7.0, 1.0]], device=DEVICE)
    assert select_tokens(scores, 2, largest=True, keep_last=1, backend=backend)[0].tolist() == [[0, 3]]
    sink = int32(0)
    assert select_tokens(scores, 2, largest=True, sink_positions=sink, backend=backend)[0].tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threshold": 1.0, "largest": True}, ValueError, "largest is True and threshold was given; it is for k"),
        ({"threshold": 1.0, "relative": True}, ValueError, "relative is True and threshold was given"),
        ({"k": 1, "largest": 1}, TypeError, "largest is 1; it must be True or False"),
        ({"k": 9}, ValueError, "k is 9; it must be from 0 to the number of tokens, 4"),
    ],
)
def test_what_excludes_each_other(options, error, message):
    with pytest.raises(error, match=message):
        select_tokens(torch.zeros(1, 4), **options)
    with pytest.raises(ValueError, match="largest is True and cu_seqlens was given; it is for rows of a batch"):
        select_tokens(torch.zeros(4), 1, cu_seqlens=torch.tensor([0, 4]).int(), largest=True)
