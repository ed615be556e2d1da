"""add_low_rank: both backends against one token at a time in float64, in both layouts; sinks and padding untouched."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank_kernels import add_low_rank
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import low_rank as pytorch
from tests.orthorank_kernels import statements
from tests.orthorank_kernels.rows_tools import BACKENDS, LAYOUTS, random, strided_views
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget, set_settings

OPS = torch.ops.orthorank_kernels


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def some(batch: int, tokens: int, hidden: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Hidden states, low-rank states, map and bias."""
    return (
        random(batch, tokens, hidden, dtype=dtype),
        random(batch, tokens, rank, dtype=dtype, seed=1),
        random(hidden, rank, dtype=dtype, seed=2),
        random(hidden, dtype=dtype, seed=3),
    )


def stated(*args: Tensor, **how: Any) -> Tensor:
    on_cpu = {name: value.cpu() for name, value in how.items()}
    return statements.add_low_rank(*(a.cpu() for a in args), **on_cpu).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "hidden", "rank"),
    [(1, 64, 1), (63, 40, 3), (65, 200, 16), (5, 577, 100), (127, 64, 64), (3, 4096, 65), (2, 96, 512)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_as_exact_as_eager(backend, tokens, hidden, rank, dtype, poisoned):
    args = some(2, tokens, hidden, rank, dtype)
    actual = add_low_rank(*args, backend=backend)
    assert actual.is_contiguous()
    exact = stated(*args)
    assert_within_budget(actual, pytorch.add_low_rank(*args), exact, dtype, steps=2)
    bare = add_low_rank(*args[:3], backend=backend)
    assert_within_budget(bare, pytorch.add_low_rank(*args[:3]), stated(*args[:3]), dtype, steps=2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_rounded_once(backend):
    """In bfloat16, 256 + 0.75 + 0.75 is 258: each addend alone would be lost."""
    bfloat16 = {"dtype": torch.bfloat16, "device": DEVICE}
    h, low, up = (
        torch.full(shape, value, **bfloat16) for shape, value in (((1, 2, 8), 256.0), ((1, 2, 1), 0.75), ((8, 1), 1.0))
    )
    actual = add_low_rank(h, low, up, torch.full((8,), 0.75, **bfloat16), backend=backend)
    assert (actual[:, 0] == 256).all()
    assert (actual[:, 1] == 258).all()


PADDED = {
    "the first tokens": {},
    "no sink": {"sink_positions": ints(-1, -1, -1)},
    "some sinks": {"sink_positions": ints(4, -1, 40)},
    "left padding": {"starts": ints(0, 7, 69)},
    "right padding": {"lengths": ints(70, 3, 0)},
    "both": {"starts": ints(5, 69, 66), "lengths": ints(60, 9, -4), "sink_positions": ints(5, -1, 66)},
    "out of range": {"starts": ints(-3, 80, 2), "lengths": ints(99, 2, 2)},
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_sinks_and_padding_stay_whatever_they_hold(backend, name, poisoned):
    h, low, up, bias = some(3, 70, 136, 20)
    how = PADDED[name]
    changes = pytorch.changing(low, how.get("starts"), how.get("lengths"), how.get("sink_positions"), None)
    assert name == "no sink" or not changes.all()
    low[~changes.expand(3, 70)] = torch.nan
    actual = add_low_rank(h, low, up, bias, **how, backend=backend)
    torch.testing.assert_close(actual.double(), stated(h, low, up, bias, **how), rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[~changes.expand(3, 70)], h[~changes.expand(3, 70)])


MANY = torch.linspace(0, 70, 130).int().to(DEVICE)  # most are empty, and more than are looked at in one step
SEQUENCES = {
    "two": {"cu_seqlens": ints(0, 30, 70)},
    "empty ones, tokens past the last": {"cu_seqlens": ints(0, 0, 3, 3, 61), "sink_positions": ints(0, 0, 5, 0)},
    "later chunks": {"cu_seqlens": ints(0, 1, 2, 70), "sink_positions": ints(-1, 0, -1)},
    "many": {"cu_seqlens": MANY},
    "many, sinks elsewhere": {"cu_seqlens": MANY, "sink_positions": (torch.arange(129, device=DEVICE) % 3 - 1).int()},
    "none": {"cu_seqlens": ints(0)},
}


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_packed_sequences(backend, name, poisoned):
    h, low, up, bias = (x.squeeze(0) for x in some(1, 70, 136, 20))
    actual = add_low_rank(h, low, up, bias, **SEQUENCES[name], backend=backend)
    expected = stated(h, low, up, bias, **SEQUENCES[name])
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    same = (expected == h.double()).all(dim=-1)
    assert same.any()
    assert torch.equal(actual[same], h[same])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiles_change_nothing_but_the_order_of_sums(backend, monkeypatch):
    """Whatever the tiles are, and whichever of them a token is in."""
    args = some(1, 70, 200, 70)
    expected = add_low_rank(*args, backend=backend)
    set_settings(monkeypatch, "add_low_rank", block_m=16, block_n=32)
    torch.testing.assert_close(add_low_rank(*args, backend=backend), expected, rtol=1e-5, atol=2e-5)
    h, low, up, bias = args
    later = add_low_rank(h[:, 9:], low[:, 9:], up, bias, sink_positions=ints(-1), backend=backend)
    torch.testing.assert_close(later, expected[:, 9:], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_strides_are_honoured(backend, layout, poisoned):
    """``low`` and ``up`` as columns of wider tensors, whatever these hold beside them."""
    h, wide, wider = strided_views(2, 9, 24, torch.float32)[layout], random(2, 9, 50, seed=1), random(24, 30, seed=2)
    low, up = wide[..., 7:12], wider[:, 3:8]
    wide[..., 12:], wider[:, 8:] = torch.nan, torch.nan
    actual = add_low_rank(h, low, up, backend=backend)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), stated(h, low, up), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_out_is_written_and_returned_and_may_be_the_hidden_states(backend, poisoned):
    h, low, up, bias = some(2, 70, 200, 20)
    expected = add_low_rank(h, low, up, bias)
    out = torch.empty_like(h)
    assert add_low_rank(h, low, up, bias, out=out, backend=backend) is out
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert add_low_rank(h, low, up, bias, out=h, backend=backend) is h
    torch.testing.assert_close(h, expected, rtol=1e-5, atol=1e-5)
    flat, ends = random(70, 200), {"cu_seqlens": ints(0, 70)}
    again = add_low_rank(flat, low[0], up, bias, **ends)
    assert add_low_rank(flat, low[0], up, bias, **ends, out=flat, backend=backend) is flat
    torch.testing.assert_close(flat, again, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_dimensions(backend, shape):
    *rows, hidden = shape
    assert add_low_rank(random(*shape), random(*rows, 3), random(hidden, 3), backend=backend).shape == shape
    some = random(1, 2, 4), random(1, 2, 3), random(4, 3)
    assert add_low_rank(*some, backend=backend).shape == (1, 2, 4)


def test_gradients_are_exact():
    args = [x.double().cpu().requires_grad_() for x in some(2, 4, 3, 2)]
    starts, lengths = torch.tensor([1, 0], dtype=torch.int32), torch.tensor([3, 2], dtype=torch.int32)
    assert torch.autograd.gradcheck(add_low_rank, args)
    assert torch.autograd.gradcheck(lambda *a: add_low_rank(*a, starts=starts, lengths=lengths), args)
    packed, ends = [x.flatten(0, 1) if x.dim() == 3 else x for x in args], torch.tensor([0, 3, 7], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *a: add_low_rank(*a, cu_seqlens=ends), packed)
    poisoned = args[1].detach().clone()
    poisoned[0, 0] = torch.nan
    add_low_rank(args[0], poisoned, *args[2:], starts=starts).sum().backward()
    assert all(x.grad is None or x.grad.isfinite().all() for x in args)


def test_operators_keep_their_promises_to_torch():
    h, low, up, bias = some(2, 5, 8, 3)
    row = ints(0, 1)
    for args in ((h, low, up), (h, low, up, bias, row, row + 3, row), (random(2, 8, 5).transpose(1, 2), low, up)):
        torch.library.opcheck(OPS.add_low_rank.default, args)
    packed = (h[:1], low[:1], up, bias, None, None, ints(0, -1), ints(0, 2, 4))
    torch.library.opcheck(OPS.add_low_rank.default, packed)
    torch.library.opcheck(OPS.add_low_rank_out.default, packed, {"out": torch.zeros_like(h[:1])})


def test_it_compiles_into_one_graph():
    compiled = torch.compile(add_low_rank, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 4):
        args = some(2, tokens, 8, 3)
        torch.testing.assert_close(compiled(*args), add_low_rank(*args))
        ends = ints(0, 2, tokens)
        args = (args[0][0], args[1][0], *args[2:])
        torch.testing.assert_close(compiled(*args, cu_seqlens=ends), add_low_rank(*args, cu_seqlens=ends))


H, LOW, UP = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(4, 5)
GOOD: dict[str, Any] = {"hidden_states": H, "low": LOW, "up": UP}
ROWS = torch.zeros(2, dtype=torch.int32)
ENDS = torch.tensor([0, 2], dtype=torch.int32)
FLAT = {"hidden_states": H[0], "low": LOW[0]}
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "packed without ends": (FLAT, ValueError, r"hidden_states has shape \[3, 4\]; it must be \[batch, tokens, hidden"),
    "batch with ends": ({"cu_seqlens": ENDS}, ValueError, r"hidden_states has shape \[2, 3, 4\]; it must be \[total,"),
    "other tokens": (
        {"low": LOW[:, :2]},
        ValueError,
        r"low has shape \[2, 2, 5\]; hidden_states, before the rank, asks",
    ),
    "rank 0": ({"low": LOW[..., :0], "up": UP[:, :0]}, ValueError, "its last dimension, the rank, must be at least 1"),
    "up of another rank": ({"up": UP[:, 1:]}, ValueError, r"up has shape \[4, 4\]; the shape of hidden_states and low"),
    "up of another dtype": ({"up": UP.half()}, TypeError, "up has dtype float16 and hidden_states float32"),
    "up is strided": ({"up": UP.T.contiguous().T}, ValueError, "up has strides .*; the last one must be 1"),
    "bias of another size": ({"bias": UP[0]}, ValueError, r"bias has shape \[5\]; the shape of hidden_states"),
    "bias is strided": ({"bias": UP[:, 0]}, ValueError, "bias has strides"),
    "starts of another batch": ({"starts": ROWS[:1]}, ValueError, r"starts has shape \[1\]; it must be \[2\]"),
    "int64": ({"sink_positions": ROWS.long()}, TypeError, "sink_positions has dtype int64; it may be int32"),
    "starts of sequences": ({**FLAT, "cu_seqlens": ENDS, "starts": ROWS}, ValueError, "starts was given with cu_seqle"),
    "a sink too many": ({**FLAT, "cu_seqlens": ENDS, "sink_positions": ROWS}, ValueError, r"sink_positions has shape"),
    "falling": ({**FLAT, "cu_seqlens": ENDS.flip(0)}, ValueError, "cu_seqlens begins with 2"),
    "out of another shape": ({"out": H[0]}, ValueError, r"out has shape \[3, 4\]; the op's output"),
    "out over low": (
        {"low": torch.zeros(2, 3, 4), "up": UP[:, :4].contiguous(), "out": "low"},
        ValueError,
        "out shares",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_argument_and_the_fix(name):
    changes, error, message = BAD_CALLS[name]
    call = {**GOOD, **changes}
    call |= {n: call[v] for n, v in call.items() if isinstance(v, str)}
    with pytest.raises(error, match=message):
        add_low_rank(**call)


def test_what_no_kernel_does():
    args = [x.to(DEVICE, torch.float64) for x in (H, LOW, UP)]
    with pytest.raises(TypeError, match="hidden_states has dtype float64; the Triton kernel takes float32"):
        add_low_rank(*args, backend="triton")
    h, low, up, _ = some(2, 3, 4, 5)
    with pytest.raises(BackendError, match="requires grad"):
        add_low_rank(h, low.requires_grad_(), up, out=torch.empty_like(h))
