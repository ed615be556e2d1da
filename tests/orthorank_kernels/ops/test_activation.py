"""silu_and_mul: both backends against float64 and against Hugging Face's MLP."""

import pytest
import torch

from orthorank_kernels import silu_and_mul
from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.pytorch import activation as pytorch
from tests.orthorank_kernels.rows_tools import BACKENDS, LAYOUTS, random, some_positions, strided_views
from tests.orthorank_kernels.tools import DEVICE, DTYPES, assert_within_budget

OPS = torch.ops.orthorank_kernels


def exact(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate = gate.double()
    return gate / (1 + torch.exp(-gate)) * up.double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("selected", "width"), [(1, 1), (63, 40), (5, 1000), (127, 577), (3, 4096), (2, 14336)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_as_exact_as_eager(backend, selected, width, dtype, poisoned):
    gate, up = 4 * random(2, selected, width, dtype=dtype), random(2, selected, width, dtype=dtype, seed=1)
    actual = silu_and_mul(gate, up, backend=backend)
    assert actual.is_contiguous()
    assert_within_budget(actual, pytorch.silu_and_mul(gate, up), exact(gate, up), dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rounding_is_that_of_the_hugging_face_mlp(backend):
    gate, up = random(1, 50, 96, dtype=torch.bfloat16), random(1, 50, 96, dtype=torch.bfloat16, seed=1)
    expected = torch.nn.functional.silu(gate) * up
    # exp differs in its last bit now and then, which moves a rounding.
    assert (silu_and_mul(gate, up, backend=backend) != expected).float().mean() <= 0.002


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_strides_are_honoured(backend, layout, poisoned):
    gate, up = strided_views(2, 9, 24, torch.float32)[layout], random(2, 9, 48)[..., 24:]
    actual = silu_and_mul(gate, up, backend=backend)
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), exact(gate, up), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_merged_projection_is_gate_then_up(backend):
    merged = random(2, 7, 30)
    expected = exact(merged[..., :15], merged[..., 15:]).float()
    torch.testing.assert_close(silu_and_mul(merged, backend=backend), expected, rtol=1e-6, atol=1e-6)
    packed = silu_and_mul(merged[1], backend=backend)
    torch.testing.assert_close(packed, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_missing_rows_are_zeros_whatever_they_hold(backend, poisoned):
    gate, up, positions = random(2, 5, 8), random(2, 5, 8, seed=1), some_positions(2, 9, 5)
    positions[1, 0] = -1
    expected = exact(gate, up).float().masked_fill((positions < 0)[..., None], 0)
    gate[positions < 0] = float("nan")
    actual = silu_and_mul(gate, up, positions=positions, backend=backend)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert not actual[positions < 0].any()
    packed = silu_and_mul(gate[1], up[1], positions=positions[1], backend=backend)
    torch.testing.assert_close(packed, expected[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_values(backend):
    gate = torch.tensor([[0.0, -200.0, 200.0, float("inf"), float("nan"), -1e-40]], device=DEVICE)
    actual = silu_and_mul(gate, torch.full_like(gate, 2.0), backend=backend)[0].tolist()
    assert actual[:4] == [0.0, 0.0, 400.0, float("inf")]
    assert actual[4] != actual[4]
    assert abs(actual[5]) < 1e-39


@pytest.mark.parametrize("name", ["gate", "up", "other"])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_out_is_written_and_returned_and_may_be_an_input(backend, name):
    tensors = {"gate": random(3, 2100), "up": random(3, 2100, seed=1), "other": random(3, 2100, seed=2)}
    expected = silu_and_mul(tensors["gate"], tensors["up"])
    out = tensors[name]
    assert silu_and_mul(tensors["gate"], tensors["up"], out=out, backend=backend) is out
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 0, 4), (2, 2, 0), (0, 4), (2, 0)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_dimensions(backend, shape):
    assert silu_and_mul(random(*shape), random(*shape), backend=backend).shape == shape


def test_gradients_are_exact():
    gate, up = (random(2, 3, 4, dtype=torch.float64, seed=s).cpu().requires_grad_() for s in (0, 1))
    positions = torch.tensor([[0, 1, -1], [3, -1, -1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(silu_and_mul, (gate, up))
    assert torch.autograd.gradcheck(lambda *a: silu_and_mul(*a, positions=positions), (gate, up))
    assert torch.autograd.gradcheck(silu_and_mul, (gate,))
    assert torch.autograd.gradcheck(silu_and_mul, (gate.detach(), up))


def test_operators_keep_their_promises_to_torch():
    gate, up, positions = random(2, 5, 8), random(2, 5, 16)[..., 8:], some_positions(2, 9, 5)
    for args in ((gate, up), (gate, up, positions), (random(2, 8, 5).transpose(1, 2), up[..., :8])):
        torch.library.opcheck(OPS.silu_and_mul.default, args)
    torch.library.opcheck(OPS.silu_and_mul_out.default, (gate, up), {"out": torch.zeros_like(gate)})


def test_it_compiles_into_one_graph():
    compiled = torch.compile(silu_and_mul, fullgraph=True, backend="aot_eager", dynamic=True)
    for selected in (3, 4):
        merged = random(2, selected, 12)
        torch.testing.assert_close(compiled(merged), silu_and_mul(merged))


GATE, POSITIONS = torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int32)
BAD_CALLS = {
    "one dimension": ((GATE[0, 0],), {}, ValueError, r"gate has shape \[4\]; it must be \[batch, selected, width\]"),
    "integers": ((GATE.int(), GATE.int()), {}, TypeError, "gate has dtype int32; it may be"),
    "up of another shape": ((GATE, GATE[:, :2]), {}, ValueError, r"up has shape \[2, 2, 4\]; the shape of gate"),
    "up of another dtype": ((GATE, GATE.half()), {}, TypeError, "up has dtype float16 and gate float32"),
    "odd width": ((GATE[..., :3],), {}, ValueError, "its last dimension, gate and up, must be even"),
    "gate is strided": ((GATE.transpose(1, 2), GATE.transpose(1, 2)), {}, ValueError, "the last one must be 1"),
    "positions of another count": (
        (GATE, GATE),
        {"positions": POSITIONS[:, :2]},
        ValueError,
        r"positions has shape \[2, 2\]; the shape of gate asks for \[2, 3\]",
    ),
    "out of another shape": ((GATE, GATE), {"out": GATE[0]}, ValueError, r"out has shape \[3, 4\]; the op's output"),
    "out of another dtype": ((GATE, GATE), {"out": GATE.half()}, TypeError, "out has dtype float16"),
    "out is strided": (
        (GATE, GATE),
        {"out": torch.zeros(3, 2, 4).transpose(0, 1)},
        ValueError,
        "an output must be contiguous",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_errors_name_the_argument_and_the_fix(name):
    args, kwargs, error, message = BAD_CALLS[name]
    with pytest.raises(error, match=message):
        silu_and_mul(*args, **kwargs)


def test_what_no_kernel_does():
    gate = GATE.to(DEVICE, torch.float64)
    with pytest.raises(TypeError, match="gate has dtype float64; the Triton kernel takes float32"):
        silu_and_mul(gate, gate, backend="triton")
    with pytest.raises(BackendError, match="requires grad"):
        silu_and_mul(random(2, 3, 4).requires_grad_(), random(2, 3, 4), out=random(2, 3, 4))
