"""A CPU in the place of the GPU, for dry runs: the same methods as `cuda.Gpu`. What it measures says nothing."""

import time
from collections.abc import Callable
from typing import Any

import torch

MOST_PROBES = 12


class Cpu:
    """Calls run at once, and a captured call runs again into the memory of its first result."""

    device, dtype, backend, target = torch.device("cpu"), torch.float32, "torch", "sm_90a"

    def facts(self) -> dict[str, Any]:
        return {"gpu": "none (dry run on a CPU)", "torch": torch.__version__}

    def flush(self) -> None:
        """Nothing: the time does not matter."""

    def wait(self) -> None:
        """Nothing: every call has ended when it returns."""

    def around(self, call: Callable[[], Any]) -> float:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    def capture(self, call: Callable[[], Any]) -> tuple[Any, Callable[[], float]]:
        result = call()

        def replay() -> float:
            began = time.perf_counter()
            again = call()
            seconds = time.perf_counter() - began
            for old, new in zip(tensors(result), tensors(again), strict=True):
                old.copy_(new)
            return seconds

        return result, replay

    def free(self) -> None:
        """Nothing is cached."""

    def peak(self) -> int:
        """Unknown."""
        return 0

    def probes(self, every: list[Any]) -> tuple[list[Any], Callable[[Any], Any]]:
        """A few of those of sm_90a, assembled for it; the table that they are compared with stands in for the GPU."""
        from tests.ptx.cuda_driver import assemble
        from tests.ptx.probes import run_here

        known = [probe for probe in every if 90 in probe.targets][:MOST_PROBES]
        assemble(known, self.target)
        return known, run_here


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors in what a call returned: one, or several in tuples."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [x for each in result for x in tensors(each)] if isinstance(result, (tuple, list)) else []
