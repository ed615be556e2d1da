"""Derivatives and `torch.func` through every op: right, or an error; never zeros.

The kernels have no backward and the operators no derivative of their own, so whatever wants one takes the reference,
which PyTorch differentiates. An operator that ran instead would give a tangent of zeros without a word.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from orthorank_kernels.dispatch import BackendError
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Sizes, calls, flat

DOUBLE = Sizes(batch=2, tokens=9, selected=4, hidden=8, heads=2, kv_heads=1, head_dim=4)
NAMES = list(calls(Numbers(), DOUBLE))


def floating(call: Call) -> list[int | str]:
    """Places of what has derivatives; float8 is storage, PyTorch does not compute with it."""
    return [at for at, x in call.tensors().items() if x.is_floating_point() and x.element_size() > 1]


def results(call: Call, **options: Any) -> list[Tensor]:
    """Floating results; of an op that writes to arguments, copies of them that were written."""
    if call.op in IN_PLACE:
        call = call.where(torch.clone, *range(IN_PLACE[call.op]))
        call(**options)
        return call.written()
    return [x for x in flat(call(**options)) if x.is_floating_point()]


def function_of(call: Call, place: int | str) -> Callable[[Tensor], Tensor]:
    """One number that depends on all floating results, as a function of one argument."""

    def total(x: Tensor) -> Tensor:
        found = results(call.where(lambda _: x, place))
        weights = [torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).reshape(y.shape) for y in found]
        return torch.stack([(y * w).sum() for y, w in zip(found, weights, strict=True)]).sum()

    return total


def slope(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    """Of ``f`` in ``direction``, from differences of two steps (Richardson): in float32, three digits."""

    def difference(step: float) -> float:
        return float((f(x + step * direction).double() - f(x - step * direction).double()) / (2 * step))

    with torch.no_grad():
        return (4 * difference(2e-3) - difference(4e-3)) / 3


def dual_tensor(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    with torch.no_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent
    assert tangent is not None
    return float(tangent)


def func_jvp(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    return float(torch.func.jvp(f, (x,), (direction,))[1])


def func_grad(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    return float((torch.func.grad(f)(x) * direction).sum())


def backward(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> float:
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(f(leaf), leaf)
    return float((gradient * direction).sum())


# PyTorch's fused attention, which the reference calls where it needs no scores, has no forward mode and says so.
NO_FORWARD = {
    name
    for name, call in calls(Numbers(), DOUBLE).items()
    if name.startswith("sparse_query_attention") and "sinks" not in call.options
}
DIFFERENTIABLE = [
    (name, place)
    for name, call in calls(Numbers(), DOUBLE).items()
    if not name.startswith("select_tokens")
    for place in floating(call)
]


@pytest.mark.parametrize(("name", "place"), DIFFERENTIABLE)
def test_both_modes_give_the_slope(name: str, place: int | str) -> None:
    call = calls(Numbers(seed=3), DOUBLE)[name]
    f, x = function_of(call, place), call.tensors()[place].clone()
    direction = Numbers(seed=5).floats(*x.shape)
    exact = slope(f, x, direction)
    for way in (dual_tensor, func_jvp, func_grad, backward):
        if name in NO_FORWARD and way in (dual_tensor, func_jvp):
            with pytest.raises(NotImplementedError, match="forward AD"):
                way(f, x, direction)
        else:
            assert way(f, x, direction) == pytest.approx(exact, rel=1e-2, abs=3e-3), way.__name__


@pytest.mark.parametrize("name", ["scatter_rows_", "scatter_add_rows_, packed", "apply_rotary_and_cache_"])
def test_what_is_missing_takes_no_tangent_from_the_rest(name: str) -> None:
    """Where nobody knows how many entries are missing, they are written somewhere, too."""
    call = calls(Numbers(), DOUBLE)[name]
    call = call.where(lambda x: torch.where(torch.arange(x.shape[-1]) % 3 == 1, -1, x), IN_PLACE[call.op])
    rows = call.args[-1] if name.startswith("scatter_add") else call.args[IN_PLACE[call.op] + 1]
    direction, found = Numbers(seed=5).floats(*rows.shape), {}
    for backend in ("reference", "torch"):
        with torch.no_grad(), forward_ad.dual_level():
            made = call.where(lambda x: forward_ad.make_dual(x, direction) if x is rows else x, *range(len(call.args)))
            written = results(made, backend=backend)[0]
            found[backend] = forward_ad.unpack_dual(written).tangent
    torch.testing.assert_close(found["torch"], found["reference"], rtol=1e-5, atol=1e-6)
    assert found["torch"].any()


@pytest.mark.parametrize("name", NAMES)
def test_a_choice_has_no_derivative_and_says_none(name: str) -> None:
    """Positions and counts are ints: no gradient flows through them, and none is claimed."""
    call = calls(Numbers(), DOUBLE)[name]
    for place in floating(call):
        with torch.enable_grad():
            made = call.where(lambda x: x.clone().requires_grad_(), place)
            if place in range(IN_PLACE.get(call.op, 0)):
                continue  # a leaf that requires grad cannot be written to
            integers = [x for x in flat(made()) if not x.is_floating_point()]
        assert not any(x.requires_grad for x in integers)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_refuses_what_wants_a_tangent_or_a_gradient(name: str) -> None:
    call = calls(Numbers(), DOUBLE)[name]
    place = floating(call)[-1]
    x = call.tensors()[place].clone()
    with forward_ad.dual_level(), pytest.raises(BackendError, match="the kernels have no backward"):
        call.where(lambda _: forward_ad.make_dual(x, torch.ones_like(x)), place)(backend="triton")
    with torch.enable_grad(), pytest.raises(BackendError, match="the kernels have no backward"):
        call.where(lambda _: x.requires_grad_(), place)(backend="triton")


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_the_loop_or_an_error(name: str) -> None:
    call = calls(Numbers(), DOUBLE)[name]
    for place in floating(call):
        x = call.tensors()[place]
        many = torch.stack([x, x.flip(0), x.flip(-1)])
        loop = [results(call.where(lambda _, y=y: y, place)) for y in many]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is a loop inside
            if call.op in IN_PLACE:
                with pytest.raises(RuntimeError, match=r"vmap|[Bb]atching"):
                    torch.vmap(lambda y, place=place: results(call.where(lambda _: y, place)))(many)
                continue
            batched = torch.vmap(lambda y, place=place: tuple(results(call.where(lambda _: y, place))))(many)
        for i, one in enumerate(zip(*loop, strict=True)):
            torch.testing.assert_close(batched[i], torch.stack(one), rtol=1e-5, atol=1e-5)
