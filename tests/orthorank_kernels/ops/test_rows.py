"""gather_rows, scatter_rows_ and scatter_add_rows_: both backends against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_kernels import gather_rows, scatter_add_rows_, scatter_rows_
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import rows as pytorch
from tests.orthorank_kernels.rows_tools import (
    BACKENDS,
    LAYOUTS,
    gathered_by_loop,
    random,
    some_positions,
    strided_views,
)
from tests.orthorank_kernels.tools import DEVICE, DTYPES

OPS = torch.ops.orthorank_kernels


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "selected", "hidden"),
    [(1, 1, 576), (63, 21, 1), (127, 127, 40), (1000, 9, 576), (4097, 5, 1000), (12, 4, 4096), (6, 3, 14336)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_copies_rows_bit_for_bit(backend, tokens, selected, hidden, dtype, poisoned):
    x, positions = random(3, tokens, hidden, dtype=dtype), some_positions(3, tokens, selected)
    actual = gather_rows(x, positions, backend=backend)
    assert actual.is_contiguous()
    assert torch.equal(actual, gathered_by_loop(x, positions))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, layout, poisoned):
    x = strided_views(2, 40, 24, torch.bfloat16)[layout]
    positions = some_positions(2, 40, 30)[:, 3:25]  # a slice, too
    rows = strided_views(2, 22, 24, torch.bfloat16)[layout] * 3
    assert torch.equal(gather_rows(x, positions, backend=backend), gathered_by_loop(x, positions))

    storage = x._base if x._base is not None else x
    before = storage.clone()
    expected_rows = x.clone()
    pytorch.scatter_rows_(expected_rows, positions, rows)
    scatter_rows_(x, positions, rows, backend=backend)
    assert torch.equal(x, expected_rows)
    x.copy_(before.as_strided(x.shape, x.stride(), x.storage_offset()))
    assert torch.equal(storage, before), "wrote outside the view"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autograd_sees_that_memory_was_written_to(backend):
    out, rows = random(1, 8, 16), random(1, 2, 16)
    positions = torch.tensor([[3, 1]], dtype=torch.int32, device=DEVICE)
    factor = random(1, 8, 16).requires_grad_()
    loss = (factor * out).sum()  # which keeps `out` for the gradient
    scatter_rows_(out, positions, rows, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_entries_are_zeros_whatever_is_in_the_way(backend, poisoned):
    nan = float("nan")
    x = torch.full((2, 4, 8), nan, device=DEVICE)
    x[0, 2] = 1.0
    positions = torch.tensor([[2, -1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    expected = torch.zeros(2, 2, 8, device=DEVICE)
    expected[0, 0] = 1.0
    assert torch.equal(gather_rows(x, positions, backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "selected", "hidden"), [(1, 1, 576), (63, 21, 7), (1000, 9, 576), (6, 3, 14336)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scatter_writes_the_named_rows_and_no_other(backend, tokens, selected, hidden, dtype):
    out, positions = random(3, tokens, hidden, dtype=dtype), some_positions(3, tokens, selected)
    rows = random(3, selected, hidden, dtype=dtype, seed=1)
    expected = out.clone()
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if p >= 0:
                expected[b, p] = rows[b, i]
    assert scatter_rows_(out, positions, rows, backend=backend) is None
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "selected", "hidden"), [(1, 1, 576), (63, 21, 7), (1000, 9, 577), (6, 3, 14336)])
@pytest.mark.parametrize("scale", [1.0, 0.22])
@pytest.mark.parametrize("backend", BACKENDS)
def test_scatter_add_rounds_as_eager_and_touches_no_other_row(backend, scale, tokens, selected, hidden, dtype):
    out, positions = random(3, tokens, hidden, dtype=dtype), some_positions(3, tokens, selected)
    rows, residual = (random(3, selected, hidden, dtype=dtype, seed=seed) for seed in (1, 2))
    expected = out.clone()
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if p >= 0:
                expected[b, p] = residual[b, i] + rows[b, i] * scale
    assert scatter_add_rows_(out, positions, rows, residual, scale=scale, backend=backend) is None
    if scale == 1.0 or dtype != torch.float32:
        assert torch.equal(out, expected), "each rounding is stated"
    else:  # a GPU may fuse product and sum, which saves a rounding
        torch.testing.assert_close(out, expected, rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_a_batch_of_one(backend, poisoned):
    """Whichever sequence a row belongs to; entries past the count are -1."""
    x, (rows, residual) = random(50, 3, 24, dtype=torch.bfloat16)[:, 1], random(2, 17, 24, dtype=torch.bfloat16)
    positions = some_positions(1, 50, 14)[0]
    positions = torch.cat([positions, torch.full((3,), -1, dtype=torch.int32, device=DEVICE)])
    assert torch.equal(gather_rows(x, positions, backend=backend), gathered_by_loop(x[None], positions[None])[0])
    for op, args in ((scatter_rows_, (rows,)), (scatter_add_rows_, (rows, residual))):
        out, expected = x.clone(), x.clone()[None]
        op(out, positions, *args, backend=backend)
        op(expected, positions[None], *(a[None] for a in args), backend="torch")
        assert torch.equal(out, expected[0])
        assert not torch.equal(out, x)


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_out_is_written_and_returned(backend):
    for x, positions in (
        (random(2, 9, 24), some_positions(2, 9, 5)),
        (random(9, 24), some_positions(1, 9, 5)[0]),
    ):
        out = torch.full((*positions.shape, 24), float("nan"), device=DEVICE)
        assert gather_rows(x, positions, out=out, backend=backend) is out
        assert torch.equal(out, gather_rows(x, positions, backend="torch"))
    with pytest.raises(ValueError, match="out has strides"):
        gather_rows(x, positions, out=out.new_empty(24, 5).T)
    with pytest.raises(BackendError, match="out= got an input that requires grad"):
        gather_rows(x.requires_grad_(), positions, out=out)


@pytest.mark.parametrize(
    ("shape", "strides", "refused"),
    [
        ((2, 5, 4), (20, 4, 1), False),
        ((2, 5, 4), (4, 8, 1), False),  # tokens first
        ((2, 5, 4), (0, 4, 1), True),
        ((2, 5, 4), (20, 3, 1), True),  # neighbouring tokens share an element
        ((2, 5, 4), (16, 4, 1), True),  # the last token of one row is the first of the next
        ((2, 5, 4), (4, 4, 1), True),
        ((1, 5, 4), (0, 4, 1), False),  # a stride that is never taken
        ((2, 5, 1), (5, 1, 7), False),
        ((2, 0, 4), (0, 0, 1), False),
    ],
)
@pytest.mark.parametrize("op", [scatter_rows_, scatter_add_rows_])
def test_memory_that_is_written_twice_is_refused(op, shape, strides, refused):
    out = torch.zeros(100).as_strided(shape, strides)
    positions = torch.full((shape[0], 2), -1, dtype=torch.int32)
    rows = (torch.zeros(shape[0], 2, shape[2]),) * (1 if op is scatter_rows_ else 2)
    if refused:
        with pytest.raises(ValueError, match=r"share memory, and it is written to: pass out\.clone"):
            op(out, positions, *rows)
    else:
        op(out, positions, *rows)
        assert not out.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_scatter_skips_missing_entries_wherever_they_are(backend):
    """Also between present ones, next to a token 0 that is written, and in rows where nothing is present."""
    positions = torch.tensor([[-1, 0, -1, 3], [-1, -1, -1, -1], [0, 1, 2, 3], [-1, 2, -1, -1]], dtype=torch.int32)
    out = torch.full((4, 4, 3), float("nan"), device=DEVICE)
    rows = random(4, 4, 3)
    rows[positions < 0] = float("inf")
    scatter_rows_(out, positions.to(DEVICE), rows, backend=backend)
    for b, row in enumerate(positions.tolist()):
        for token in range(4):
            if token in row:
                assert torch.equal(out[b, token], rows[b, row.index(token)])
            else:
                assert out[b, token].isnan().all()


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_gather_after_scatter_gives_the_rows_back(data):
    batch, tokens = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    selected = data.draw(st.integers(0, tokens))
    positions = some_positions(batch, tokens, selected, seed=data.draw(st.integers(0, 99)))
    out, rows = random(batch, tokens, 5), random(batch, selected, 5, seed=1)
    scatter_rows_(out, positions, rows)
    expected = rows.masked_fill((positions < 0)[..., None], 0)
    assert torch.equal(gather_rows(out, positions), expected)


@pytest.mark.parametrize("shape", [(0, 4, 8, 2), (2, 0, 8, 3), (2, 4, 8, 0), (2, 4, 0, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_dimensions(backend, shape):
    batch, tokens, hidden, selected = shape
    x = random(batch, tokens, hidden)
    positions = torch.full((batch, selected), -1 if tokens == 0 else 0, dtype=torch.int32, device=DEVICE)
    rows = random(batch, selected, hidden)
    assert torch.equal(gather_rows(x, positions, backend=backend), gathered_by_loop(x, positions))
    scatter_add_rows_(x, positions[:, :1], rows[:, :1], rows[:, :1], backend=backend)
    scatter_rows_(x, positions[:, :1], rows[:, :1], backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_past_32_bits(backend):
    """The last row starts 2^31 elements in; of the memory between, nothing is touched."""
    stride, hidden = 2**30, 8
    try:
        storage = torch.empty(2 * stride + hidden, dtype=torch.float16, device=DEVICE)
    except RuntimeError:
        pytest.skip("no address space for 4 GiB")
    x = storage.as_strided((1, 3, hidden), (2 * stride, stride, 1))
    x.copy_(random(1, 3, hidden, dtype=torch.float16))
    positions = torch.tensor([[0, 2]], dtype=torch.int32, device=DEVICE)
    assert torch.equal(gather_rows(x, positions, backend=backend), x[:, ::2])
    rows = random(1, 2, hidden, dtype=torch.float16, seed=1)
    scatter_rows_(x, positions, rows, backend=backend)
    assert torch.equal(x[:, ::2], rows)
    scatter_add_rows_(x, positions, rows, rows, backend=backend)
    assert torch.equal(x[:, ::2], rows + rows)


def test_gradients_are_exact():
    positions = torch.tensor([[0, 3, 4], [1, -1, -1], [-1, -1, -1], [-1, 2, -1]], dtype=torch.int32)
    x, rows, residual = (
        random(*shape, dtype=torch.float64).cpu().requires_grad_() for shape in ((4, 5, 3), (4, 3, 3), (4, 3, 3))
    )

    def scattered(x: torch.Tensor, *rows: torch.Tensor, **scale: float) -> torch.Tensor:
        out = x.clone()
        (scatter_rows_ if len(rows) == 1 else scatter_add_rows_)(out, positions, *rows, **scale)
        return out

    assert torch.autograd.gradcheck(lambda x: gather_rows(x, positions), (x,))
    assert torch.autograd.gradcheck(scattered, (x, rows))
    assert torch.autograd.gradcheck(lambda *args: scattered(*args, scale=0.3), (x, rows, residual))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, positions[0]), (x[0],))
    assert torch.autograd.gradcheck(lambda x: gather_rows(x, positions[0, :0]), (x[0],))


def test_operators_keep_their_promises_to_torch():
    x, positions = random(2, 9, 6), some_positions(2, 9, 4)
    rows, residual = random(2, 4, 6), random(2, 4, 6, seed=1)
    for op, args in (
        (OPS.gather_rows, (x, positions)),
        (OPS.scatter_rows_, (x, positions, rows)),
        (OPS.scatter_add_rows_, (x, positions, rows, residual)),
        (OPS.scatter_add_rows_, (x, positions, rows, residual, 0.5)),
    ):
        torch.library.opcheck(op.default, args)
    torch.library.opcheck(OPS.gather_rows_out.default, (x, positions), {"out": torch.zeros_like(rows)})


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_compiled_function_is_one_graph(dynamic):
    def layer(h: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        picked = gather_rows(h, positions)
        scatter_rows_(out, positions, picked + 1)
        scatter_add_rows_(out, positions, gather_rows(out, positions), picked, scale=0.5)
        gather_rows(h[0], positions[0], out=picked[0])
        return out + picked.sum()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (9, 10):
        h, positions = random(2, tokens, 6), some_positions(2, tokens, 4)
        assert torch.equal(compiled(h, positions), layer(h, positions))


X, POSITIONS, ROWS = torch.zeros(2, 5, 4), torch.zeros(2, 3, dtype=torch.int32), torch.zeros(2, 3, 4)
BAD_CALLS = {
    "x is no tensor": (gather_rows, ([1.0], POSITIONS), TypeError, "x is a list; it must be a tensor"),
    "x has one dimension": (gather_rows, (X[0, 0], POSITIONS), ValueError, r"x has shape \[4\]; it must be \[batch, t"),
    "positions of the other layout": (
        gather_rows,
        (X[0], POSITIONS),
        ValueError,
        r"positions has shape \[2, 3\]; it must be \[selected\]",
    ),
    "packed positions of a batch": (gather_rows, (X, POSITIONS[0]), ValueError, r"it must be \[batch, selected\]"),
    "rows of the other layout": (scatter_rows_, (X[0], POSITIONS[0], ROWS), ValueError, r"it must be \[selected, hid"),
    "x is an integer": (gather_rows, (X.int(), POSITIONS), TypeError, "x has dtype int32; it may be float32"),
    "x is transposed": (
        gather_rows,
        (torch.zeros(2, 4, 5).transpose(1, 2), POSITIONS),
        ValueError,
        r"x has strides \[20, 1, 5\]; the last one must be 1: pass x.contiguous\(\)",
    ),
    "positions are int64": (
        gather_rows,
        (X, POSITIONS.long()),
        TypeError,
        "positions has dtype int64; it may be int32",
    ),
    "positions of another batch": (gather_rows, (X, POSITIONS[:1]), ValueError, "must be the batch, 2"),
    "rows of another dtype": (
        scatter_rows_,
        (X, POSITIONS, ROWS.half()),
        TypeError,
        "rows has dtype float16 and out fl",
    ),
    "rows of another width": (scatter_rows_, (X, POSITIONS, ROWS[..., :2]), ValueError, r"rows has shape \[2, 3, 2\]"),
    "out shares memory": (
        scatter_rows_,
        (X[:, :1].expand(2, 5, 4), POSITIONS, ROWS),
        ValueError,
        r"out has shape \[2, 5, 4\] and strides \[20, 0, 1\]; a stride smaller .* pass out.clone\(\)",
    ),
    "residual of another shape": (
        scatter_add_rows_,
        (X, POSITIONS, ROWS, ROWS[:, :2]),
        ValueError,
        r"residual has shape \[2, 2, 4\]; the shape of rows asks for \[2, 3, 4\]",
    ),
    "residual of another dtype": (
        scatter_add_rows_,
        (X, POSITIONS, ROWS, ROWS.half()),
        TypeError,
        "residual has dtype float16 and out float32",
    ),
    "another device": (gather_rows, (X.to("meta"), POSITIONS), ValueError, "positions is on cpu; it must be on meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_argument_and_the_fix(name):
    op, args, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        op(*args)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; it may be one of 'auto', 'triton', 'torch', 'reference'"):
        gather_rows(X, POSITIONS, backend="cuda")
    with pytest.raises(BackendError, match="requires grad, and the kernels have no backward"):
        gather_rows(random(2, 5, 4).requires_grad_(), POSITIONS.to(DEVICE), backend="triton")
    x, rows = (t.to(DEVICE, torch.float64) for t in (X, ROWS))
    with pytest.raises(TypeError, match="out has dtype float64; the Triton kernel takes float32"):
        scatter_add_rows_(x, POSITIONS.to(DEVICE), rows, rows, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"cannot run on device cpu: .* set TRITON_INTERPRET=1"):
        gather_rows(X, POSITIONS, backend="triton")
