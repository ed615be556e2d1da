"""What a captured graph needs of every op: no wait for the device, memory that the caller owns, the tensors' device.

Launchers run on fake CUDA tensors: asking one of them for a number raises, and what would be launched is noted.
"""

import inspect

import pytest
import torch

import orthorank_kernels
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Shapes, Sizes, calls, flat
from tests.orthorank_kernels.fake_gpu import Allocations, fake_gpus, memory
from tests.orthorank_kernels.tools import DEVICE

pytest.importorskip("triton")

HALF = Sizes(dtype=torch.bfloat16)
NAMES = list(calls(Shapes("meta")))


def takes_out(op: str) -> bool:
    return "out" in inspect.signature(getattr(orthorank_kernels, op)).parameters and op not in IN_PLACE


def call_of(name: str, device: str = "cuda:0", sizes: Sizes = HALF) -> Call:
    return calls(Shapes(device), sizes)[name]


def describe(tensors: list[torch.Tensor]) -> list[tuple]:
    return [(list(x.shape), x.stride(), x.dtype, x.device) for x in tensors]


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("name", NAMES)
def test_no_op_waits_for_the_device(name, backend):
    with fake_gpus() as gpus:
        call_of(name)(backend=backend)
    assert bool(gpus.launches) == (backend == "triton")


def test_a_wait_would_be_seen():
    with fake_gpus(), pytest.raises(Exception, match="_local_scalar_dense"):
        Shapes("cuda:0").floats(3).sum().item()


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("name", NAMES)
def test_kernels_run_on_the_device_of_the_tensors(name, target):
    with fake_gpus(target) as gpus:
        assert gpus.current == 0
        results = flat(call_of(name, "cuda:1")(backend="triton"))
        assert gpus.current == 0, "the device from before is back"
    assert gpus.launches
    assert {current for _, current, _ in gpus.launches} == {1}
    assert all(x.device == torch.device("cuda:1") for x in results)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_promised_to_a_compiler_is_what_a_launcher_returns(name):
    """Shape, strides, dtype and device of the fake implementation."""
    with fake_gpus():
        call = call_of(name)
        assert describe(flat(call(backend="auto"))) == describe(flat(call(backend="triton")))


@pytest.mark.parametrize("name", NAMES)
def test_one_launch(name):
    with fake_gpus() as gpus:
        call_of(name)(backend="triton")
    assert len(gpus.launches) == 1


@pytest.mark.parametrize("name", NAMES)
def test_results_are_new_memory(name):
    with fake_gpus():
        call = call_of(name)
        with Allocations() as made:
            results = flat(call(backend="triton"))
        given = {memory(x) for x in call.tensors().values()}
        assert not given & {memory(x) for x in results}
    assert bool(results) == bool(made.operations) == (call.op not in IN_PLACE)


WITH_OUT = [name for name, call in calls(Shapes("meta")).items() if takes_out(call.op)]


def test_every_op_that_returns_something_takes_memory_of_the_caller():
    found = calls(Shapes("meta"))
    assert {found[name].op for name in WITH_OUT} == {call.op for call in found.values()} - IN_PLACE.keys()


@pytest.mark.parametrize("name", WITH_OUT)
def test_with_memory_of_the_caller_nothing_is_allocated(name):
    with fake_gpus() as gpus:
        call = call_of(name, "cuda:1")
        out = call(backend="auto")
        with Allocations() as made:
            written = call(backend="triton", out=out)
        assert not made.operations
        assert [memory(x) for x in flat(written)] == [memory(x) for x in flat(out)]
        assert describe(flat(written)) == describe(flat(out))
        pointers = [x for _, _, options in gpus.launches for x in options.values() if isinstance(x, torch.Tensor)]
        assert {memory(x) for x in flat(out)} <= {memory(x) for x in pointers}, "not every output is written"


@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
@pytest.mark.parametrize("name", WITH_OUT)
def test_memory_of_the_caller_gets_what_would_be_returned(name, backend):
    call = calls(Numbers(DEVICE))[name]
    out = call(backend=backend)
    expected = [x.clone() for x in flat(out)]
    for x in flat(out):
        x.fill_(-7)
    written = flat(call(backend=backend, out=out))
    for x, y, z in zip(expected, flat(out), written, strict=True):
        assert y is z or (memory(y) == memory(z) and y.stride() == z.stride())
        torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)
