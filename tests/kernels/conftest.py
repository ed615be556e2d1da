"""Set-up for the kernel tests."""

from collections.abc import Iterator

import pytest

from orthorank_kernels.dispatch import interpreting
from tests.kernels.tools import poisoned_outputs


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter() -> None:
    """bfloat16 under the interpreter computes as on a GPU."""
    if interpreting():
        from tests.kernels.interpreter import repair_bfloat16

        repair_bfloat16()


@pytest.fixture
def poisoned() -> Iterator[None]:
    """A test that asks for this sees NaN in every output value that nobody wrote."""
    with poisoned_outputs():
        yield
