"""Launches on a GPU that is not there: fake CUDA tensors, launchers that run, kernels that are noted instead of run.

A fake tensor has a device, a shape and strides and no numbers: whatever asks for a number (``.item()``, ``.tolist()``,
a condition on a tensor) raises.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode


@dataclass
class Gpus:
    """Fake GPUs with a current one, and what was launched on them: ``(kernel, current GPU, keyword arguments)``."""

    current: int = 0
    launches: list[tuple[str, int, dict[str, Any]]] = field(default_factory=list)

    def exchange(self, index: int) -> int:
        before, self.current = self.current, index if index >= 0 else self.current
        return before

    def launch(self, kernel: Any, options: dict[str, Any]) -> None:
        self.launches.append((kernel.fn.__name__, self.current, options))


@contextlib.contextmanager
def fake_gpus(target: str = "sm_90", *, note: bool = True) -> Iterator[Gpus]:
    """Inside, tensors on ``cuda:N`` are fake, and their kernels are noted (``note``) or go to Triton."""
    from triton.runtime.jit import KernelInterface

    from orthorank_kernels.triton import configs

    gpus = Gpus()

    def noted(kernel: Any, grid: Any) -> Any:
        def launch(*args: Any, **options: Any) -> None:
            assert not args, "launch by keyword"
            gpus.launch(kernel, options)

        return launch

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=False), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # alignment: launchers may look
        if note:
            patch.setattr(KernelInterface, "__getitem__", noted)
        patch.setattr(configs, "_gpu_target", lambda index: target)
        patch.setattr(configs, "_count", lambda index: 132, raising=False)  # multiprocessors
        patch.setattr(torch.cuda, "_exchange_device", gpus.exchange)
        patch.setattr(torch.cuda, "_maybe_exchange_device", gpus.exchange)
        yield gpus


class Allocations(TorchDispatchMode):
    """Names of the operations inside that returned new memory; an empty tensor has none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {memory(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        made = [x for x in (result if isinstance(result, tuple | list) else (result,)) if isinstance(x, torch.Tensor)]
        self.operations += [str(func) for x in made if x.numel() and memory(x) not in given]
        return result


def memory(x: torch.Tensor) -> int:
    """The same for tensors that share memory."""
    return x.untyped_storage()._cdata
