"""The time of a launch, for `orthorank_kernels.tuning`."""

from collections.abc import Callable

import torch
from triton.errors import TritonError
from triton.testing import do_bench


def milliseconds(run: Callable[[], torch.Tensor]) -> tuple[torch.Tensor | None, float]:
    """The result of ``run`` and its median time with a cold L2 cache; (None, inf) if the GPU cannot launch it."""
    try:
        result = run()
    except (TritonError, RuntimeError):  # it does not compile, or wants more shared memory or registers than there are
        return None, float("inf")
    return result, do_bench(run, warmup=20, rep=100, return_mode="median")
