"""gather_rows, gather_add_rms_norm, scatter_rows_: both backends against plain loops and float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orthorank_kernels import gather_add_rms_norm, gather_rows, scatter_rows_
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.reference import rows as reference
from tests.kernels.tools import DEVICE, DTYPES, assert_within_budget

BACKENDS = ("reference", "triton")
EPS = 1e-5
OPS = torch.ops.orthorank_kernels


def some_positions(batch: int, tokens: int, selected: int, seed: int = 0) -> torch.Tensor:
    """Ascending positions; batch row b has b entries fewer than row 0, so -1 at its end."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.full((batch, selected), -1, dtype=torch.int32)
    for b in range(batch):
        count = max(0, selected - b)
        positions[b, :count] = torch.randperm(tokens, generator=generator)[:count].sort().values.int()
    return positions.to(DEVICE)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided_views(batch: int, tokens: int, hidden: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tensors [batch, tokens, hidden] of every layout that callers have."""
    return {
        "contiguous": random(batch, tokens, hidden, dtype=dtype),
        "slice of a fused projection": random(batch, tokens, 3 * hidden, dtype=dtype)[..., hidden : 2 * hidden],
        "slice of the tokens": random(batch, tokens + 5, hidden, dtype=dtype)[:, 2:-3],
        "tokens first": random(tokens, batch, hidden, dtype=dtype).transpose(0, 1),
        "every second row": random(2 * batch, 2 * tokens, hidden, dtype=dtype)[::2, ::2],
    }


LAYOUTS = tuple(strided_views(1, 1, 1, torch.float32))


def gathered_by_loop(x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(*positions.shape, x.shape[2], dtype=x.dtype, device=x.device)
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if p >= 0:
                out[b, i] = x[b, p]
    return out


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

    expected = reference.gather_add_rms_norm(x.contiguous(), positions, rows.contiguous(), x[0, 0].contiguous(), EPS)
    actual = gather_add_rms_norm(x, positions, rows, x[0, 0], EPS, backend=backend)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-7)

    storage = x._base if x._base is not None else x
    before = storage.clone()
    expected_rows = x.clone()
    reference.scatter_rows_(expected_rows, positions, rows)
    scatter_rows_(x, positions, rows, backend=backend)
    assert torch.equal(x, expected_rows)
    x.copy_(before.as_strided(x.shape, x.stride(), x.storage_offset()))
    assert torch.equal(storage, before), "wrote outside the view"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "selected", "hidden"), [(1, 1, 7), (63, 21, 576), (1000, 8, 1000), (9, 3, 4096), (5, 2, 14336)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_add_rms_norm_is_as_exact_as_eager(backend, tokens, selected, hidden, dtype, poisoned):
    x, positions = random(2, tokens, hidden, dtype=dtype), some_positions(2, tokens, selected)
    addend, weight = random(2, selected, hidden, dtype=dtype, seed=1), random(hidden, dtype=dtype, seed=2)
    residual, normed = gather_add_rms_norm(x, positions, addend, weight, EPS, backend=backend)

    eager = reference.gather_add_rms_norm(x, positions, addend, weight, EPS)
    assert torch.equal(residual, eager[0]), "one addition and one rounding leave no choice"
    exact = reference.gather_add_rms_norm(
        eager[0].double(), entries(eager[0]), 0 * addend.double(), weight.double(), EPS
    )
    assert_within_budget(normed, eager[1], exact[1], dtype)


def entries(rows: torch.Tensor) -> torch.Tensor:
    """Positions that name every row of ``rows`` in order."""
    return torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).repeat(rows.shape[0], 1)


@pytest.mark.parametrize("rows", [1, 1500, 9000])
def test_rows_of_one_program_do_not_change_the_result(rows, monkeypatch):
    """The launcher gives several rows to a program when there are many; nothing else may change."""
    launcher = pytest.importorskip("orthorank_kernels.triton.rows")
    x, positions = random(1, 30, 40, dtype=torch.bfloat16), some_positions(1, 30, 21)
    args = (x, positions, random(1, 21, 40, dtype=torch.bfloat16, seed=1), x[0, 3])
    expected = gather_add_rms_norm(*args, EPS, backend="triton")
    many = launcher.rows_per_program(rows)
    monkeypatch.setattr(launcher, "rows_per_program", lambda n_rows: many)
    for one, other in zip(gather_add_rms_norm(*args, EPS, backend="triton"), expected, strict=True):
        assert torch.equal(one, other)
    assert 1 <= many <= 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rounding_is_that_of_the_hugging_face_layer(backend, dtype):
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    norm = llama.LlamaRMSNorm(576, eps=EPS).to(DEVICE, dtype)
    norm.weight.data = random(576, dtype=dtype, seed=5)
    x, addend = random(1, 20, 576, dtype=dtype), random(1, 20, 576, dtype=dtype, seed=1)
    residual, normed = gather_add_rms_norm(x, entries(x), addend, norm.weight.data, EPS, backend=backend)
    assert torch.equal(residual, x + addend)
    differing = (normed != norm(x + addend)).float().mean()
    # Another order of the sum moves the float32 result by an ulp or two, which moves a rounding now and then.
    assert differing <= (0.6 if dtype == torch.float32 else 0.002)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_entries_are_zeros_whatever_is_in_the_way(backend, poisoned):
    nan = float("nan")
    x = torch.full((2, 4, 8), nan, device=DEVICE)
    x[0, 2] = 1.0
    positions = torch.tensor([[2, -1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    addend = torch.full((2, 2, 8), nan, device=DEVICE)
    addend[0, 0] = 0.0
    expected = torch.zeros(2, 2, 8, device=DEVICE)
    expected[0, 0] = 1.0
    assert torch.equal(gather_rows(x, positions, backend=backend), expected)
    residual, normed = gather_add_rms_norm(x, positions, addend, torch.ones(8, device=DEVICE), 1e-30, backend=backend)
    assert torch.equal(residual, expected)
    assert torch.equal(normed, expected)


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
    residual, normed = gather_add_rms_norm(x, positions, rows, random(hidden), EPS, backend=backend)
    assert residual.shape == normed.shape == (batch, selected, hidden)
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
    residual, _ = gather_add_rms_norm(x, positions, x[:, ::2], x[0, 0], EPS, backend=backend)
    assert torch.equal(residual, x[:, ::2] + x[:, ::2])
    scatter_rows_(x, positions, residual, backend=backend)
    assert torch.equal(x[:, ::2], residual)


def test_gradients_are_exact():
    positions = torch.tensor([[0, 3, 4], [1, -1, -1], [-1, -1, -1], [-1, 2, -1]], dtype=torch.int32)
    x, rows, weight = (
        random(*shape, dtype=torch.float64).cpu().requires_grad_() for shape in ((4, 5, 3), (4, 3, 3), (3,))
    )

    def scattered(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        scatter_rows_(out, positions, rows)
        return out

    assert torch.autograd.gradcheck(lambda x: gather_rows(x, positions), (x,))
    assert torch.autograd.gradcheck(lambda x, a, w: gather_add_rms_norm(x, positions, a, w, EPS), (x, rows, weight))
    assert torch.autograd.gradcheck(scattered, (x, rows))


def test_operators_keep_their_promises_to_torch():
    x, positions = random(2, 9, 6), some_positions(2, 9, 4)
    rows, weight = random(2, 4, 6), random(6)
    for op, args in (
        (OPS.gather_rows, (x, positions)),
        (OPS.gather_add_rms_norm, (x, positions, rows, weight, EPS)),
        (OPS.scatter_rows_, (x, positions, rows)),
    ):
        torch.library.opcheck(op.default, args)


def test_a_compiled_layer_is_one_graph():
    def layer(h: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = h.clone()
        picked = gather_rows(h, positions)
        residual, normed = gather_add_rms_norm(h, positions, picked, weight, EPS)
        scatter_rows_(out, positions, residual + normed)
        return out

    h, positions, weight = random(2, 9, 6), some_positions(2, 9, 4), random(6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(h, positions, weight), layer(h, positions, weight))
    h = h.requires_grad_()
    assert torch.allclose(compiled(h, positions, weight), layer(h, positions, weight))


X, POSITIONS, ROWS, WEIGHT = (
    torch.zeros(2, 5, 4),
    torch.zeros(2, 3, dtype=torch.int32),
    torch.zeros(2, 3, 4),
    torch.ones(4),
)
BAD_CALLS = {
    "x is no tensor": (gather_rows, ([1.0], POSITIONS), TypeError, "x is a list; it must be a tensor"),
    "x has two dimensions": (gather_rows, (X[0], POSITIONS), ValueError, r"x has shape \[5, 4\]"),
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
    "addend of another shape": (
        gather_add_rms_norm,
        (X, POSITIONS, ROWS[:, :2], WEIGHT, EPS),
        ValueError,
        r"addend has shape \[2, 2, 4\]; the shape of positions and hidden_states asks for \[2, 3, 4\]",
    ),
    "weight of another size": (
        gather_add_rms_norm,
        (X, POSITIONS, ROWS, WEIGHT[:3], EPS),
        ValueError,
        "weight has sha",
    ),
    "weight of another dtype": (
        gather_add_rms_norm,
        (X, POSITIONS, ROWS, WEIGHT.half(), EPS),
        TypeError,
        r"weight has dtype float16 and hidden_states float32; convert one with .to\(dtype\)",
    ),
    "eps is zero": (
        gather_add_rms_norm,
        (X, POSITIONS, ROWS, WEIGHT, 0.0),
        ValueError,
        "eps is 0.0; it must be above 0",
    ),
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
        r"out has strides \[20, 0, 1\]; a stride of 0 makes several rows share memory: pass out.clone\(\)",
    ),
    "another device": (gather_rows, (X.to("meta"), POSITIONS), ValueError, "positions is on cpu; it must be on meta"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_argument_and_the_fix(name):
    op, args, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        op(*args)


def test_an_explicit_backend_never_falls_back(monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; it may be one of 'auto', 'triton', 'reference'"):
        gather_rows(X, POSITIONS, backend="cuda")
    with pytest.raises(BackendError, match="requires grad, and the kernels have no backward"):
        gather_rows(random(2, 5, 4).requires_grad_(), POSITIONS.to(DEVICE), backend="triton")
    x, rows, weight = (t.to(DEVICE, torch.float64) for t in (X, ROWS, WEIGHT))
    with pytest.raises(TypeError, match="float64"):
        gather_add_rms_norm(x, POSITIONS.to(DEVICE), rows, weight, EPS, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match=r"cannot run on device cpu: .* set TRITON_INTERPRET=1"):
        gather_rows(X, POSITIONS, backend="triton")
