"""gather_add_rms_norm: both backends against float64, the norms of Hugging Face's models and a batch of one."""

from typing import Any

import pytest
import torch

from orthorank_kernels import gather_add_rms_norm, gather_rows
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import add_norm as pytorch
from tests.orthorank_kernels.rows_tools import BACKENDS, LAYOUTS, random, some_positions, strided_views
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget, set_settings

EPS = 1e-5
OPS = torch.ops.orthorank_kernels


def entries(rows: torch.Tensor) -> torch.Tensor:
    """Positions that name every row of ``rows`` in order."""
    return torch.arange(rows.shape[1], dtype=torch.int32, device=rows.device).repeat(rows.shape[0], 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "selected", "hidden"), [(1, 1, 7), (63, 21, 576), (1000, 8, 1000), (9, 3, 4096), (5, 2, 14336)]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gather_add_rms_norm_is_as_exact_as_eager(backend, tokens, selected, hidden, dtype, poisoned):
    x, positions = random(2, tokens, hidden, dtype=dtype), some_positions(2, tokens, selected)
    addend, weight = random(2, selected, hidden, dtype=dtype, seed=1), random(hidden, dtype=dtype, seed=2)
    residual, normed = gather_add_rms_norm(x, positions, addend, weight, EPS, backend=backend)

    eager = pytorch.gather_add_rms_norm(x, positions, addend, weight, EPS)
    assert torch.equal(residual, eager[0]), "one addition and one rounding leave no choice"
    exact = pytorch.gather_add_rms_norm(eager[0].double(), entries(eager[0]), 0 * addend.double(), weight.double(), EPS)
    assert_within_budget(normed, eager[1], exact[1], dtype)


@pytest.mark.parametrize("rows", [1, 1500, 9000])
def test_rows_of_one_program_do_not_change_the_result(rows, monkeypatch):
    """The launcher gives several rows to a program when there are many; nothing else may change."""
    launcher = pytest.importorskip("orthorank_kernels.triton.add_norm")
    x, positions = random(1, 30, 40, dtype=torch.bfloat16), some_positions(1, 30, 21)
    args = (x, positions, random(1, 21, 40, dtype=torch.bfloat16, seed=1), x[0, 3])
    expected = gather_add_rms_norm(*args, EPS, backend="triton")
    many = launcher.norm_settings(40, rows, "interpreter")["rows_per_program"]
    set_settings(monkeypatch, "gather_add_rms_norm", few_rows=1, rows=many)
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


# Each option, and what the families that need it set together.
VARIANTS: dict[str, dict[str, Any]] = {
    "no weight": {"weight": None},
    "scale": {"scale": 0.22},
    "Gemma's sandwich": {"weight_offset": 1.0, "addend_weight": True},
    "a norm of the addend alone": {"weight": None, "norm": "identity", "addend_weight": True},
    "no norm": {"weight": None, "norm": "identity"},
    "scale and a norm of the addend": {"scale": -3.0, "addend_weight": True},
    "LayerNorm": {"norm": "layer", "bias": True},
    "LayerNorm without bias": {"norm": "layer"},
    "LayerNorm without weight": {"norm": "layer", "weight": None, "bias": True},
    "LayerNorm without both": {"norm": "layer", "weight": None},
    "LayerNorm plus 1": {"norm": "layer", "weight_offset": 1.0, "bias": True},
}


def options(name: str, hidden: int, dtype: torch.dtype) -> dict[str, Any]:
    chosen = {"weight": True, **VARIANTS[name]}
    for seed, vector in enumerate(("weight", "bias", "addend_weight"), start=5):
        if chosen.get(vector):
            chosen[vector] = random(hidden, dtype=dtype, seed=seed)
    return chosen


def normed_in_float64(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    norm: str = "rms",
    bias: torch.Tensor | None = None,
    weight_offset: float = 0.0,
    **rest: Any,
) -> torch.Tensor:
    x = x.double()
    if norm == "identity":
        return x
    x = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()
    x = x if weight is None else x * (weight.double() + weight_offset)
    return x if bias is None else x + bias.double()


@pytest.mark.parametrize(("hidden", "dtype"), [(7, torch.bfloat16), *((577, d) for d in DTYPES)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_variants_are_as_exact_as_eager(backend, name, hidden, dtype, poisoned):
    x, addend = random(2, 63, hidden, dtype=dtype) + 1, random(2, 9, hidden, dtype=dtype, seed=1) * 3
    positions = some_positions(2, 63, 9)
    args = (x, positions, addend)
    chosen = options(name, hidden, dtype)
    residual, normed = gather_add_rms_norm(*args, eps=EPS, backend=backend, **chosen)
    eager = gather_add_rms_norm(*args, eps=EPS, backend="torch", **chosen)

    present = (positions >= 0)[..., None]
    weight = chosen.get("addend_weight")
    offset = chosen.get("weight_offset", 0.0)
    turned = addend if weight is None else normed_in_float64(addend, weight, weight_offset=offset)
    total = gather_rows(x, positions).double() + turned.double() * chosen.get("scale", 1.0)
    assert_within_budget(residual, eager.residual, total * present, dtype, "residual")
    # The norm of the residual that the backend itself rounded.
    own = pytorch.normalise(residual, chosen["weight"], EPS, *(chosen.get(n, d) for n, d in DEFAULTS)) * present
    if chosen.get("norm") == "identity":
        assert normed is residual
    else:
        assert_within_budget(normed, own, normed_in_float64(residual, **chosen) * present, dtype, "normed")


DEFAULTS = (("norm", "rms"), ("bias", None), ("weight_offset", 0.0))


def test_variants_differ_from_each_other():
    """An option that is ignored would be seen above; here, that the float64 statement is not blind to it."""
    x, positions, addend = random(1, 9, 40) + 1, some_positions(1, 9, 4), random(1, 4, 40, seed=1)
    results = [gather_add_rms_norm(x, positions, addend, eps=EPS, **options(n, 40, x.dtype)).normed for n in VARIANTS]
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 0.05 for other in results[:i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gemma_s_sandwich_is_hugging_face_s(backend, dtype):
    gemma = pytest.importorskip("transformers.models.gemma2.modeling_gemma2")
    after_attention, before_mlp = (gemma.Gemma2RMSNorm(576, eps=EPS).to(DEVICE, dtype) for _ in range(2))
    after_attention.weight.data, before_mlp.weight.data = (random(576, dtype=dtype, seed=s) for s in (3, 4))
    x, attended = random(1, 20, 576, dtype=dtype), random(1, 20, 576, dtype=dtype, seed=1)
    actual = gather_add_rms_norm(
        x,
        entries(x),
        attended,
        before_mlp.weight.data,
        EPS,
        weight_offset=1.0,
        addend_weight=after_attention.weight.data,
        backend=backend,
    )
    residual = x + after_attention(attended)
    for one, other in zip(actual, (residual, before_mlp(residual)), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)
        else:
            assert (one != other).float().mean() <= 0.01


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_granite_s_multiplier_is_hugging_face_s(backend, dtype):
    x, attended, weight = random(1, 9, 96, dtype=dtype), random(1, 9, 96, dtype=dtype, seed=1), random(96, dtype=dtype)
    residual, _ = gather_add_rms_norm(x, entries(x), attended, weight, EPS, scale=0.22, backend=backend)
    expected = x + attended * 0.22
    assert torch.equal(residual, expected) or (
        dtype == torch.float32 and torch.allclose(residual, expected, rtol=2e-7, atol=2e-7)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_are_honoured(backend, poisoned):
    for layout in LAYOUTS:
        x = strided_views(2, 40, 24, torch.bfloat16)[layout]
        positions = some_positions(2, 40, 30)[:, 3:25]  # a slice, too
        rows = strided_views(2, 22, 24, torch.bfloat16)[layout] * 3
        copies = (x.contiguous(), positions, rows.contiguous(), x[0, 0].contiguous())
        expected = gather_add_rms_norm(*copies, EPS, backend=backend)
        actual = gather_add_rms_norm(x, positions, rows, x[0, 0], EPS, backend=backend)
        for one, other in zip(actual, expected, strict=True):
            assert torch.equal(one, other), layout


@pytest.mark.parametrize("name", ["LayerNorm", "Gemma's sandwich", "scale"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_entries_are_zeros_whatever_is_in_the_way(backend, name, poisoned):
    x = torch.full((2, 4, 8), float("nan"), device=DEVICE)
    x[0, 2] = torch.arange(8.0)
    positions = torch.tensor([[2, -1], [-1, -1]], dtype=torch.int32, device=DEVICE)
    addend = torch.full((2, 2, 8), float("nan"), device=DEVICE)
    addend[0, 0] = 1.0
    for result in gather_add_rms_norm(x, positions, addend, eps=EPS, backend=backend, **options(name, 8, x.dtype)):
        assert torch.isfinite(result[0, 0]).all()
        assert result[0, 0].any()
        assert not result[0, 1].any()
        assert not result[1].any()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_is_a_batch_of_one(backend, name, poisoned):
    x, addend = random(50, 3, 24, dtype=torch.bfloat16)[:, 1], random(14, 24, dtype=torch.bfloat16, seed=1)
    positions = some_positions(1, 50, 14)[0]
    positions[-2:] = -1
    chosen = options(name, 24, x.dtype)
    actual = gather_add_rms_norm(x, positions, addend, eps=EPS, backend=backend, **chosen)
    expected = gather_add_rms_norm(x[None], positions[None], addend[None], eps=EPS, backend=backend, **chosen)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other[0])


@pytest.mark.parametrize("name", ["LayerNorm", "no norm"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_out_is_written_and_returned_and_may_be_the_addend(backend, packed, name):
    x, positions, addend = random(1, 50, 24), some_positions(1, 50, 14), random(1, 14, 24, seed=1)
    args = [t[0] if packed else t for t in (x, positions, addend)]
    chosen = options(name, 24, x.dtype)
    expected = gather_add_rms_norm(*args, eps=EPS, backend=backend, **chosen)
    normed = torch.full_like(args[2], float("nan")) if name == "LayerNorm" else None
    actual = gather_add_rms_norm(*args, eps=EPS, backend=backend, out=(args[2], normed), **chosen)
    assert actual.residual is args[2]
    assert actual.normed is (args[2] if normed is None else normed)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [(0, 4, 8, 2), (2, 0, 8, 3), (2, 4, 8, 0), (2, 4, 0, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_dimensions(backend, shape):
    batch, tokens, hidden, selected = shape
    positions = torch.full((batch, selected), -1 if tokens == 0 else 0, dtype=torch.int32, device=DEVICE)
    args = (random(batch, tokens, hidden), positions, random(batch, selected, hidden))
    for result in gather_add_rms_norm(*args, random(hidden), EPS, backend=backend):
        assert result.shape == (batch, selected, hidden)
    if batch:
        for result in gather_add_rms_norm(*(a[0] for a in args), random(hidden), EPS, backend=backend):
            assert result.shape == (selected, hidden)


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
    residual, _ = gather_add_rms_norm(x, positions, x[:, ::2], x[0, 0], EPS, backend=backend)
    assert torch.equal(residual, x[:, ::2] + x[:, ::2])


def test_gradients_are_exact():
    positions = torch.tensor([[0, 3, 4], [1, -1, -1], [-1, -1, -1], [-1, 2, -1]], dtype=torch.int32)
    x, addend, weight, other, bias = (
        random(*shape, dtype=torch.float64, seed=seed).cpu().requires_grad_()
        for seed, shape in enumerate(((4, 5, 3), (4, 3, 3), (3,), (3,), (3,)))
    )
    for chosen in ({}, {"scale": 0.3, "weight_offset": 1.0}, {"norm": "layer", "bias": bias}):

        def run(x: torch.Tensor, a: torch.Tensor, w: torch.Tensor, v: torch.Tensor, chosen: Any = chosen) -> Any:
            return gather_add_rms_norm(x, positions, a, w, EPS, addend_weight=v, **chosen)

        assert torch.autograd.gradcheck(run, (x, addend, weight, other))


def test_operators_keep_their_promises_to_torch():
    args = (random(2, 9, 6), some_positions(2, 9, 4), random(2, 4, 6))
    weight, bias = random(6), random(6, seed=1)
    op, into = OPS.gather_add_rms_norm.default, OPS.gather_add_rms_norm_out.default
    torch.library.opcheck(op, (*args, weight, EPS))
    torch.library.opcheck(op, (*args, weight, EPS, "layer", bias, 1.0, 0.5, weight))
    torch.library.opcheck(op, (*args, None, EPS, "identity"))
    out = {"residual": torch.zeros(2, 4, 6, device=DEVICE), "normed": torch.zeros(2, 4, 6, device=DEVICE)}
    torch.library.opcheck(into, (*args, weight, EPS), out)
    torch.library.opcheck(into, (*args, None, EPS, "identity"), {**out, "normed": None})


def test_it_compiles_into_one_graph():
    def run(h: torch.Tensor, positions: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        residual, normed = gather_add_rms_norm(h, positions, gather_rows(h, positions), weight, EPS, scale=2.0)
        _, other = gather_add_rms_norm(h[0], positions[0], residual[0], None, EPS, norm="identity")
        return normed + other

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    h, positions, weight = random(2, 9, 6), some_positions(2, 9, 4), random(6)
    assert torch.equal(compiled(h, positions, weight), run(h, positions, weight))
    h = h.requires_grad_()
    assert torch.allclose(compiled(h, positions, weight), run(h, positions, weight))


X, POSITIONS, ROWS, WEIGHT = (
    torch.zeros(2, 5, 4),
    torch.zeros(2, 3, dtype=torch.int32),
    torch.zeros(2, 3, 4),
    torch.ones(4),
)
GOOD = {"hidden_states": X, "positions": POSITIONS, "addend": ROWS, "weight": WEIGHT, "eps": EPS}
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "addend of another shape": ({"addend": ROWS[:, :2]}, ValueError, r"addend has shape \[2, 2, 4\]; the shape of po"),
    "addend of the other layout": ({"addend": ROWS[0]}, ValueError, r"must be \[batch, selected, hidden\]"),
    "weight of another size": ({"weight": WEIGHT[:3]}, ValueError, r"weight has shape \[3\]; the shape of hidden"),
    "weight of another dtype": ({"weight": WEIGHT.half()}, TypeError, "weight has dtype float16 and hidden_states fl"),
    "addend_weight of another size": ({"addend_weight": WEIGHT[:3]}, ValueError, r"addend_weight has shape \[3\]"),
    "eps is zero": ({"eps": 0.0}, ValueError, "eps is 0.0; it must be a number above 0, or a row of zeros has no norm"),
    "scale is a tensor": ({"scale": WEIGHT}, TypeError, r"scale is a tensor \[4\]; it must be a number"),
    "a norm that is none": ({"norm": "l2"}, ValueError, "norm is 'l2'; it may be one of 'rms', 'layer', 'identity'"),
    "bias for RMSNorm": ({"bias": WEIGHT}, ValueError, "bias is given and norm is 'rms', which has none; pass norm="),
    "weight for no norm": ({"norm": "identity"}, ValueError, "weight is given and norm is 'identity'"),
    "offset of no weight": ({"weight": None, "weight_offset": 1.0}, ValueError, "no weight is given that it could be"),
    "out is one tensor": ({"out": ROWS}, TypeError, r"out is a Tensor; it must be a tuple \(residual, normed\)"),
    "out of another shape": ({"out": (ROWS, X)}, ValueError, r"out\[1\] has shape \[2, 5, 4\]; the op's output"),
    "out lacks the norm": ({"out": (ROWS, None)}, TypeError, r"out\[1\] is None; it must be a tensor"),
    "out for no norm": (
        {"out": (ROWS, ROWS), "weight": None, "norm": "identity"},
        ValueError,
        r"out\[1\] is given and norm is 'identity'",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_argument_and_the_fix(name):
    changed, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        gather_add_rms_norm(**{**GOOD, **changed})


def test_what_no_kernel_does():
    x, rows, weight = (t.to(DEVICE, torch.float64) for t in (X, ROWS, WEIGHT))
    with pytest.raises(TypeError, match="hidden_states has dtype float64; the Triton kernel takes float32"):
        gather_add_rms_norm(x, POSITIONS.to(DEVICE), rows, weight, EPS, backend="triton")
    with pytest.raises(BackendError, match="requires grad"):
        gather_add_rms_norm(x.requires_grad_(), POSITIONS.to(DEVICE), rows, weight, EPS, backend="triton")
