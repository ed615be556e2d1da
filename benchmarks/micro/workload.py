"""A workload: one op on one shape, what it moves or multiplies at least, and who can do it."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch

SEED: ContextVar[int] = ContextVar("seed of the inputs", default=0)
COMPILER: ContextVar[str] = ContextVar("backend of torch.compile", default="inductor")


class LeftOut(Exception):
    """A provider that cannot run here. The message says why."""


@dataclass(frozen=True)
class Workload:
    """``amount`` is useful work of one call: bytes if ``unit`` is GB/s, floating-point operations if it is TFLOP/s.

    ``providers`` make a call; they raise `LeftOut` where they cannot run. ``check`` raises AssertionError when what a
    call returned is not right. ``amounts``: the work of providers that do another amount of it, by name.
    """

    op: str
    shape: str
    unit: str
    amount: float
    check: Callable[[Any], None]
    providers: dict[str, Callable[[], Callable[[], Any]]] = field(default_factory=dict)
    amounts: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape}"

    def amount_of(self, provider: str) -> float:
        return self.amounts.get(provider, self.amount)


def ours(device: torch.device, call: Callable[[str], Any]) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Our own providers of ``call(backend)``: the kernel, PyTorch, and PyTorch compiled."""

    def kernel() -> Callable[[], Any]:
        if device.type == "cpu":
            raise LeftOut("needs a GPU: a time of Triton's interpreter says nothing of a kernel")
        return lambda: call("triton")

    def compiled() -> Callable[[], Any]:
        made = compiled_function(lambda: call("torch"))
        return lambda: made()

    return {"triton": kernel, "torch": lambda: lambda: call("torch"), "torch.compile": compiled}


def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` compiled for static shapes."""
    return torch.compile(function, dynamic=False, backend=COMPILER.get())


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, inputs are drawn from ``seed``."""
    before = SEED.set(seed)
    try:
        yield
    finally:
        SEED.reset(before)


def needs(module: str, device: torch.device, package: str) -> None:
    """Raise `LeftOut` unless the GPU package ``module`` is installed and there is a GPU."""
    if device.type == "cpu":
        raise LeftOut(f"{package} needs a GPU")
    if find_spec(module) is None:
        raise LeftOut(f"{package} is not installed; run: make bench-install")


def dtype_for(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def random(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Normal numbers, the same at every call with one `SEED`."""
    generator = torch.Generator(device).manual_seed(SEED.get())
    return torch.randn(shape, generator=generator, device=device).to(dtype or dtype_for(device))


def thirds(device: torch.device, batch: int, tokens: int) -> torch.Tensor:
    """Positions of a random third of the tokens, ascending, without the sink: int32 ``[batch, tokens // 3]``."""
    generator = torch.Generator().manual_seed(SEED.get())
    rows = [torch.randperm(tokens - 1, generator=generator)[: tokens // 3].sort().values + 1 for _ in range(batch)]
    return torch.stack(rows).to(device, torch.int32)
