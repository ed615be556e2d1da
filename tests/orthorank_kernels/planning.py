"""Launch plans without a GPU: tensors on the CPU are planned for, and a plan's launches run in the interpreter."""

import contextlib
import ctypes
import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank_kernels import checks, dispatch, launch_notes, launch_plan
from tests.orthorank_kernels.tools import DEVICE


class Interpreted:
    """Stands for a compiled kernel: takes its arguments in order, with addresses for tensors."""

    packed_metadata = ()

    def __init__(self, kernel: Any, arguments: dict[str, Any], run: Any):
        self.kernel, self.run = kernel, run
        self.dtypes = {k: v.dtype for k, v in arguments.items() if isinstance(v, torch.Tensor)}
        self.options = {k: v for k, v in arguments.items() if k not in kernel.arg_names}

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*values: Any) -> None:
            arguments = dict(zip(self.kernel.arg_names, values, strict=True))
            given = {k: tensor_at(v, self.dtypes[k]) if k in self.dtypes else v for k, v in arguments.items()}
            self.run(self.kernel, grid)(**given, **self.options)

        return launch


def parameters_of(kernel: Any) -> list[Any]:
    """What a compiled kernel says of its parameters: an interpreted one is compiled for nothing."""
    kept = getattr(kernel, "kwargs", {}).get("do_not_specialize") or ()
    return [
        SimpleNamespace(name=name, is_constexpr="constexpr" in str(p.annotation), do_not_specialize=name in kept)
        for name, p in inspect.signature(kernel.fn).parameters.items()
    ]


def tensor_at(address: int, dtype: torch.dtype) -> torch.Tensor:
    """One number in memory; a kernel reads and writes around it."""
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(address), dtype=dtype)


@contextlib.contextmanager
def planning() -> Iterator[pytest.MonkeyPatch]:
    """Inside, calls with ``backend="triton"`` are planned; no plan is kept from before or for later."""
    with pytest.MonkeyPatch.context() as patch:
        launch_plan.forget()
        if DEVICE == "cpu":
            from triton.runtime.interpreter import InterpretedFunction

            run = InterpretedFunction.__getitem__

            def item(kernel: Any, grid: Any) -> Any:
                def launch(**arguments: Any) -> Interpreted:
                    run(kernel, grid)(**arguments)
                    return Interpreted(kernel, arguments, run)

                return launch

            patch.setattr(InterpretedFunction, "__getitem__", item)
            patch.setattr(InterpretedFunction, "params", property(parameters_of), raising=False)
            patch.setattr(launch_plan, "DEVICES", {"cpu"})
            patch.setattr(checks, "readable", lambda *values, **how: False)  # as on a GPU
            patch.setattr(launch_notes, "_supported", lambda: True)
        yield patch
        launch_plan.forget()


@contextlib.contextmanager
def by_plan_alone(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, a call that goes the long way is an error."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("this call went the long way")

    with patch.context() as inner:
        inner.setattr(dispatch, "run", refuse)
        yield
