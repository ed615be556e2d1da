"""rms_norm_select: the two ops in one launch, bit for bit, in any order of execution."""

import random as python_random
from functools import partial

import pytest
import torch

from orthorank_kernels import rms_norm_score, rms_norm_select, select_tokens
from orthorank_kernels.dispatch import BackendError, interpreting
from orthorank_kernels.triton import scoring as scoring_kernels
from orthorank_kernels.triton import selection as kernels
from tests.kernels.tools import DEVICE, DTYPES

BACKENDS = ("reference", "triton")
EPS = 1e-5


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def one_after_the_other(x, weight, k, *, backend, sink=None, **selection):
    normed, scores, _ = rms_norm_score(x, weight, EPS, sink=sink, starts=selection.get("starts"), backend=backend)
    return normed, scores, *select_tokens(scores, k, backend=backend, **selection)


def assert_same_bits(actual, expected) -> None:
    for name, one, other in zip(("normed", "scores", "positions", "counts"), actual, expected, strict=True):
        assert one.dtype == other.dtype, name
        assert torch.equal(one, other), name


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(1, torch.float32), (2, torch.float16), *((31, d) for d in DTYPES), (127, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_the_two_ops(backend, tokens, dtype, poisoned):
    x, weight = random(2, tokens, 24, dtype=dtype), random(24, dtype=dtype, seed=1)
    k = tokens // 3
    actual = rms_norm_select(x, weight, EPS, k, backend=backend)
    assert_same_bits(actual, one_after_the_other(x, weight, k, backend=backend))


@pytest.mark.parametrize("k", [0, 1, 11, 12])
def test_every_k_through_the_operator(k, poisoned):
    x, weight = random(1, 12, 8), random(8, seed=1)
    assert_same_bits(rms_norm_select(x, weight, EPS, k), one_after_the_other(x, weight, k, backend="reference"))
    actual = rms_norm_select(x, weight, EPS, k, backend="triton")
    assert_same_bits(actual, one_after_the_other(x, weight, k, backend="triton"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_sinks_and_k_of_each_row(backend, poisoned):
    x, weight = random(4, 16, 16, dtype=torch.bfloat16), random(16, dtype=torch.bfloat16, seed=1)
    selection = {
        "starts": int32(0, 5, 0, 16),
        "lengths": int32(16, 11, 11, 0),
        "sink_positions": int32(-1, 5, 3, -1),
        "keep_last": 2,
        "max_selected": 12,
    }
    k = torch.tensor([7, 3, 50, 4], device=DEVICE)
    for sink in (None, random(4, 16, dtype=torch.bfloat16, seed=2), random(16, seed=3)):
        actual = rms_norm_select(x, weight, EPS, k, sink=sink, backend=backend, **selection)
        assert_same_bits(actual, one_after_the_other(x, weight, k, sink=sink, backend=backend, **selection))
        assert actual[3].tolist() == [7, 3, 11, 0]


def test_long_rows_are_streamed(monkeypatch, poisoned):
    monkeypatch.setattr(kernels, "RESIDENT_SIZES", ((8, 8), (16, 16)))
    monkeypatch.setattr(kernels, "FUSED_TILE_PER_WARP", 4)  # tiles of 16 tokens
    monkeypatch.setattr(scoring_kernels, "ENOUGH_PROGRAMS", 8)
    x, weight = random(2, 45, 8).round(), torch.ones(8, device=DEVICE)
    selection = {"starts": int32(0, 6), "lengths": int32(45, 31)}
    for k in (15, 45):
        actual = rms_norm_select(x, weight, EPS, k, backend="triton", **selection)
        assert_same_bits(actual, one_after_the_other(x, weight, k, backend="triton", **selection))


def shuffled(n: int, seed: int) -> list[int]:
    return python_random.Random(seed).sample(range(n), n)


@pytest.mark.skipif(not interpreting(), reason="only the interpreter lets a test choose the order of programs")
@pytest.mark.parametrize(
    "order", [lambda n: list(range(n))[::-1], *(partial(shuffled, seed=s) for s in range(3))], ids=["reversed", *"abc"]
)
def test_any_order_of_programs_gives_the_same(order, monkeypatch, poisoned):
    from triton.runtime.interpreter import interpreter_builder

    x, weight = random(3, 9, 8), random(8, seed=1)
    expected = one_after_the_other(x, weight, 3, backend="triton")
    set_index = interpreter_builder.set_grid_idx
    visited = []

    def permuted(x, y, z):
        programs = order(interpreter_builder.grid_dim[0])
        visited.append(programs[x])
        set_index(programs[x], y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", permuted)
    actual = rms_norm_select(x, weight, EPS, 3, backend="triton")
    assert sorted(visited) == list(range(3 * 9))
    assert visited != sorted(visited)
    assert_same_bits(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, poisoned):
    x, weight = random(9, 2, 48)[:, :, 8:24].transpose(0, 1), random(16, seed=1)
    actual = rms_norm_select(x, weight, EPS, 4, backend=backend)
    assert actual[0].is_contiguous()
    assert_same_bits(actual, one_after_the_other(x.contiguous(), weight, 4, backend=backend))


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize(("batch", "tokens"), [(0, 5), (2, 0), (0, 0)])
def test_empty_inputs(batch, tokens, backend, poisoned):
    x = random(batch, tokens, 8)
    normed, scores, positions, counts = rms_norm_select(x, random(8), EPS, 0, max_selected=3, backend=backend)
    assert list(normed.shape) == [batch, tokens, 8]
    assert list(scores.shape) == [batch, tokens]
    assert positions.tolist() == [[-1, -1, -1]] * batch
    assert counts.tolist() == [0] * batch


def test_an_input_that_requires_grad_takes_the_reference():
    x, weight = random(1, 6, 8).requires_grad_(), random(8, seed=1)
    normed, scores, positions, _ = rms_norm_select(x, weight, EPS, 2)
    (normed[0, positions[0].long()].sum() + scores.sum()).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with pytest.raises(BackendError, match="no backward"):
        rms_norm_select(x, weight, EPS, 2, backend="triton")


def test_operator_passes_opcheck():
    op = torch.ops.orthorank_kernels.rms_norm_select.default
    x, weight = random(2, 7, 8, dtype=torch.float16), random(8, dtype=torch.float16, seed=1)
    torch.library.opcheck(op, (x, weight, EPS, 3, None, 3, None, None, None, None, 0))
    k = torch.tensor([2, 9], device=DEVICE)
    extra = (random(2, 8), int32(0, 1), int32(7, 2), int32(-1, 1), 1)
    torch.library.opcheck(op, (x, weight, EPS, 5, k, 5, *extra))


def test_compiles_as_one_graph():
    def layer(x, weight, lengths):
        return rms_norm_select(x, weight, EPS, x.shape[1] // 3, lengths=lengths, keep_last=1)

    weight, lengths = random(16, seed=1), int32(7, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 9):
        x = random(2, tokens, 16)
        assert_same_bits(compiled(x, weight, lengths), layer(x, weight, lengths))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"hidden_states": torch.ones(3, 4)}, ValueError, ["hidden_states", "[3, 4]"]),
        ({"weight": torch.ones(5)}, ValueError, ["weight", "[5]", "[4]"]),
        ({"k": 9}, ValueError, ["k is 9", "tokens, 3"]),
        ({"sink_positions": torch.ones(2)}, TypeError, ["sink_positions", "float32", "int32"]),
        ({"max_selected": -1}, ValueError, ["max_selected", "-1"]),
    ],
)
def test_errors_name_the_argument(change, error, words):
    arguments = {"hidden_states": torch.ones(2, 3, 4), "weight": torch.ones(4), "eps": EPS, "k": 1} | change
    with pytest.raises(error) as raised:
        rms_norm_select(**arguments)
    for word in words:
        assert word in str(raised.value)
