"""Launches on a GPU that is not there: fake CUDA tensors, launchers that run, kernels that are noted instead of run.

A fake tensor has a device, a shape and strides and no numbers: whatever asks for a number (``.item()``, ``.tolist()``,
a condition on a tensor) raises.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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

    if "torch._dynamo" in sys.modules:
        _let_dynamo_look_first()
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
        if not torch.backends.cuda.is_built():
            patch.setattr(torch.Tensor, "__getitem__", indexed)
        patch.setattr(torch.cuda, "device_count", lambda: 8)
        patch.setattr(torch.cuda, "_exchange_device", gpus.exchange)
        patch.setattr(torch.cuda, "_maybe_exchange_device", gpus.exchange)
        yield gpus


@functools.cache
def _let_dynamo_look_first() -> None:
    """Dynamo makes its tables of PyTorch's functions at the first compilation of a process, and keeps them: made inside
    `fake_gpus`, they would hold what stands there for a while."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.backends.cuda.is_built():  # a test may say otherwise, and Dynamo would ask a GPU for its state
            patch.setattr(torch.cuda, "is_available", lambda: False)
        torch.compile(torch.neg, backend="eager")(torch.zeros(1))


def indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    """``x[index]``, which a PyTorch without CUDA refuses to a fake CUDA tensor; views by ints, slices and None."""
    index = index if isinstance(index, tuple) else (index,)
    if not isinstance(x, FakeTensor) or any(isinstance(i, (torch.Tensor, list)) for i in index):
        return torch._C.TensorBase.__getitem__(x, index)
    if Ellipsis in index:
        at = index.index(Ellipsis)
        whole = x.dim() - sum(i is not None for i in index) + 1
        index = (*index[:at], *[slice(None)] * whole, *index[at + 1 :])
    dim = 0
    for i in index:
        if isinstance(i, int):
            x = x.select(dim, i)
            continue
        if i is None:
            x = x.unsqueeze(dim)
        elif i != slice(None):
            first, stop, step = i.indices(x.shape[dim])
            assert step == 1, "write another view"
            x = x.narrow(dim, first, max(0, stop - first))
        dim += 1
    return x


@contextlib.contextmanager
def noted_keys(target: str) -> Iterator[list[tuple[str, str]]]:
    """Inside, what would be compiled for ``target`` is noted instead: ``(kernel, key of Triton's cache)``.

    For a process without the interpreter, which cannot launch afterwards.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from benchmarks.static.worker import AbsentGpu

    keys: list[tuple[str, str]] = []

    def note(self: Any, key: Any, *args: Any, **kwargs: Any) -> None:
        keys.append((self.fn.__name__, str(key)))

    driver.set_active(AbsentGpu(target))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JITFunction, "_do_compile", note)
        yield keys


class Allocations(TorchDispatchMode):
    """Names of the operations inside that returned new memory; an empty tensor has none."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {memory(x) for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)}
        made = [x for x in (result if isinstance(result, (tuple, list)) else (result,)) if isinstance(x, torch.Tensor)]
        self.operations += [str(func) for x in made if x.numel() and memory(x) not in given]
        return result


def memory(x: torch.Tensor) -> int:
    """The same for tensors that share memory."""
    return x.untyped_storage()._cdata
