"""Set-up for the tests of benchmarks that run kernels in Triton's interpreter."""

import pytest

from orthorank_kernels.dispatch import interpreting


@pytest.fixture(scope="session", autouse=True)
def _repaired_interpreter() -> None:
    """bfloat16 under the interpreter computes as on a GPU."""
    if interpreting():
        from tests.orthorank_kernels.interpreter import repair_bfloat16

        repair_bfloat16()
