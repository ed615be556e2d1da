"""One graph of every op: `torch.compile(fullgraph=True)` takes them all, for the reference and for fake GPUs.

A graph break in a model's layer costs more than the layer saves, and a compilation for each prompt length costs
seconds: the first length is compiled as it is, the second makes sizes symbolic, and no further one compiles.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import orthorank_kernels as ok
from tests.orthorank_kernels.every_op import IN_PLACE, Call, Numbers, Shapes, Sizes, calls, flat
from tests.orthorank_kernels.fake_gpu import fake_gpus

# An operator whose outputs share memory with each other or its inputs: an error in later versions of PyTorch.
pytestmark = pytest.mark.filterwarnings("error:.*custom operator:UserWarning")
Arguments = dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]]
# Lengths from one kernel setting's range, as the sizes of any prompt may be; neither 0, 1 nor equal to another size.
LENGTHS = ({"tokens": 48, "selected": 18}, {"tokens": 61, "selected": 21}, {"tokens": 37, "selected": 11})


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments_of(found: dict[str, Call]) -> Arguments:
    return {name: (call.op, call.args, dict(call.options)) for name, call in found.items()}


def everything(arguments: Arguments) -> dict[str, Any]:
    """The results of every call, and of those that write to arguments, those arguments."""
    results = {}
    for name, (op, args, options) in arguments.items():
        result = getattr(ok, op)(*args, **options)
        results[name] = [x * 1 for x in args[: IN_PLACE[op]]] if result is None else result
    return results


def on_the_cpu(**lengths: int) -> Arguments:
    return arguments_of(calls(Numbers(), Sizes(**lengths)))


def tensors(results: dict[str, Any]) -> list[Tensor]:
    return [x for result in results.values() for x in flat(result)]


def test_every_op_in_one_graph_on_a_cpu_gives_what_it_gives_alone() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True)
    for lengths in LENGTHS:
        expected, got = everything(on_the_cpu(**lengths)), compiled(on_the_cpu(**lengths))
        assert list(got) == list(expected)
        for name in expected:
            for x, y in zip(flat(expected[name]), flat(got[name]), strict=True):
                torch.testing.assert_close(
                    x, y, rtol=0, atol=0, equal_nan=True, msg=lambda text, n=name: f"{n}: {text}"
                )
                assert x.stride() == y.stride()
    assert counter.frame_count == 2, "one compilation for the first length, one for all others"


def test_every_op_in_one_graph_on_fake_gpus() -> None:
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True)
    with fake_gpus():
        for lengths in LENGTHS:
            arguments = arguments_of(calls(Shapes("cuda:0"), Sizes(dtype=torch.bfloat16, **lengths)))
            expected = tensors(everything(arguments))
            got = tensors(compiled(arguments))
            assert [(x.shape, x.stride(), x.dtype, x.device) for x in got] == [
                (x.shape, x.stride(), x.dtype, x.device) for x in expected
            ]
    assert counter.frame_count == 2
    for graph in counter.graphs:
        called = {str(node.target) for node in graph.graph.nodes if "orthorank_kernels" in str(node.target)}
        assert {name.split(".")[1] for name in called} == {call[0] for call in on_the_cpu().values()}
