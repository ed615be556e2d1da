"""Set-up for the kernel tests."""

from collections.abc import Generator, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from orthorank_kernels.dispatch import interpreting
from tests.orthorank_kernels import on_gpu
from tests.orthorank_kernels.tools import poisoned_outputs


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter() -> None:
    """bfloat16 under the interpreter computes as on a GPU."""
    if interpreting():
        from tests.orthorank_kernels.interpreter import repair_bfloat16

        repair_bfloat16()


def _count_launches() -> list[int]:
    """How many kernels the interpreter has run, as one number that grows."""
    from triton.runtime.interpreter import GridExecutor

    count, run = [0], GridExecutor.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        return run(self, *args, **kwargs)

    GridExecutor.__call__ = counted
    return count


LAUNCHES = _count_launches() if interpreting() and find_spec("triton") else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """What is chosen for hardware is right: a test that launches kernels is run there, and no other."""
    before = None if LAUNCHES is None else LAUNCHES[0]
    result = yield  # what fails or is skipped ends here
    if LAUNCHES is not None:
        launched, where = LAUNCHES[0] > before, "tests/orthorank_kernels/on_gpu.py"
        if launched and not on_gpu.uses_gpu(item):
            pytest.fail(f"this test launches kernels, and a GPU would leave it out: see {where}")
        if not launched and on_gpu.must_launch(item):
            pytest.fail(f"this test launches no kernel, and a GPU would run it: name it in {where}")
    return result


@pytest.fixture(autouse=True)
def _one_eager_attention() -> Iterator[None]:
    """The reference computes alike on every GPU: PyTorch would choose among backends there, by shapes and set-up."""
    if not torch.cuda.is_available():
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture
def poisoned() -> Iterator[None]:
    """A test that asks for this sees NaN in every output value that nobody wrote."""
    with poisoned_outputs():
        yield
