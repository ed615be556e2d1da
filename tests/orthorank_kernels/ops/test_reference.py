"""The reference gives what the docstrings say, and what runs in PyTorch the same, gradients included."""

import pytest
import torch
from torch import Tensor

from orthorank_kernels.dispatch import BackendError
from orthorank_kernels.support import OPS
from tests.orthorank_kernels import statements
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Sizes, calls, flat

SMALL = Sizes(batch=2, tokens=17, selected=5, hidden=8, heads=4, kv_heads=2, head_dim=4)
TINY = Sizes(batch=2, tokens=5, selected=3, hidden=4, heads=2, kv_heads=1, head_dim=4)
NAMES = list(calls(Numbers(), SMALL))
CLOSE = {torch.float32: (1e-5, 1e-5), torch.float16: (4e-3, 4e-3), torch.bfloat16: (3e-2, 3e-2)}


def with_gaps(call: Call) -> Call:
    """The last query or row of each sequence missing."""
    if "positions" not in call.options and call.op.startswith(("gather", "scatter", "silu", "apply", "sparse")):
        place = {"apply_rotary_at": 3, "apply_rotary_and_cache_": 2, "silu_and_mul": -1}.get(
            call.op, 3 if "sparse" in call.op else 1
        )

        def gap(positions: Tensor) -> Tensor:
            positions = positions.clone()
            positions[..., -1] = -1
            return positions

        return call.where(gap, place)
    return call


def results(call: Call, backend: str) -> list[Tensor]:
    """What a call returns, or wrote."""
    if call.op in IN_PLACE:
        call = call.where(torch.clone, *range(IN_PLACE[call.op]))
        call(backend=backend)
        return call.written()
    return flat(call(backend=backend))


@pytest.mark.parametrize("dtype", list(CLOSE), ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_path_gives_what_the_reference_gives(name: str, dtype: torch.dtype) -> None:
    call = calls(Numbers(), SMALL.with_(dtype=dtype))[name]
    for each in (call, with_gaps(call)):
        one, other = results(each, "reference"), results(each, "torch")
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            rtol, atol = CLOSE[dtype] if a.is_floating_point() else (0, 0)
            torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("rms_norm_select")])
def test_the_reference_gives_what_the_docstrings_say(name: str) -> None:
    call = with_gaps(calls(Numbers(seed=1), SMALL)[name])
    stated = getattr(statements, call.op)(*call.args, **call.options)
    found = results(call, "reference")
    if call.op == "select_tokens":
        assert found[1].tolist() == [len(row) for row in stated]
        assert found[0][found[0] >= 0].tolist() == [p for row in stated for p in row]
        return
    wanted = flat(stated)
    if call.options.get("write_norm") is False:
        wanted = wanted[1:]
    for one, other in zip(wanted, found, strict=False):  # statements give no empty tensors, and no lse
        if other.numel():
            torch.testing.assert_close(other.double(), one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("select_tokens")])
def test_gradients_of_both_are_the_same(name: str) -> None:
    call = calls(Numbers(seed=2), TINY)[name]
    places = [at for at, x in call.tensors().items() if x.is_floating_point() and x.element_size() > 1]
    found = {}
    for backend in ("reference", "torch"):
        leaves = {at: call.tensors()[at].clone().requires_grad_() for at in places}
        given = call
        for at, leaf in leaves.items():
            given = given.where(lambda _, leaf=leaf: leaf, at)
        outputs = [y for y in results(given, backend) if y.is_floating_point() and y.requires_grad]
        weights = [torch.linspace(0.5, 1.5, y.numel()).reshape(y.shape) for y in outputs]
        total = torch.stack([(y.float() * w).sum() for y, w in zip(outputs, weights, strict=True)]).sum()
        found[backend] = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    assert any(gradient.abs().max() > 0 for gradient in found["torch"])
    for one, other in zip(found["reference"], found["torch"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


IN_DOUBLE = [name for name in NAMES if torch.float64 in OPS[name.split(",")[0]].pytorch and "float8" not in name]


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", IN_DOUBLE)
def test_gradcheck(name: str, backend: str) -> None:
    call = calls(Numbers(seed=3), TINY.with_(dtype=torch.float64))[name]
    places = [at for at, x in call.tensors().items() if x.dtype == torch.float64]

    def run(*values: Tensor) -> list[Tensor]:
        given = call
        for at, value in zip(places, values, strict=True):
            given = given.where(lambda _, value=value: value, at)
        found = [y for y in results(given, backend) if y.dtype == torch.float64]  # an lse is float32
        return [y for y in found if y.numel()]

    leaves = tuple(call.tensors()[at].clone().requires_grad_() for at in places)
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_the_reference_needs_values() -> None:
    x, positions = torch.ones(1, 4, 2), torch.zeros(1, 2, dtype=torch.int32)
    call = Call("gather_rows", (x, positions), {})
    with pytest.raises(BackendError, match=r"the meta device has none; use backend=\"auto\" or backend=\"torch\""):
        call.where(lambda t: t.to("meta"), 0, 1)(backend="reference")
    with pytest.raises((BackendError, torch._dynamo.exc.TorchDynamoException)):  # the second has not all of its words
        torch.compile(lambda x: call.where(lambda _: x, 0)(backend="reference"), fullgraph=True, backend="eager")(x)
