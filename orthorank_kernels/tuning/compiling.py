"""Compiles what `orthorank_kernels.tuning.tune` will time, many candidates at once, in processes that need no GPU.

A process launches the op of a problem on empty CPU tensors of the same shapes, with Triton's driver replaced by one
that only knows the target, and stops at the compiled kernel. It lies in Triton's cache then, where the launch on the
GPU finds it.
"""

import os
import subprocess
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orthorank_kernels import op as _library
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.settings.lookup import Settings
from orthorank_kernels.tuning import problems as tuning_problems

MULTIPROCESSORS = 132  # of an H100


class Compiled(NamedTuple):
    """What became of a candidate: kernels that were compiled, the most shared memory of one, or the error's words."""

    kernels: int = 0
    shared: int = 0
    error: str | None = None


def unknown_to_ptxas(architecture: str) -> str:
    """What the assembler that Triton brings says of an architecture which it does not know, or nothing."""
    import triton

    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    if not ptxas.is_file():
        return ""
    command = [str(ptxas), "--gpu-name", architecture, os.devnull]
    asked = subprocess.run(command, capture_output=True, text=True, check=False)
    return asked.stderr.strip().splitlines()[0] if "gpu-name" in asked.stderr else ""


class AbsentGpu:
    """In place of Triton's driver: says which GPU to compile for, and has no other ability."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
        else:
            self.target = GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def pool(target: str, workers: int, multiprocessors: int = MULTIPROCESSORS) -> Iterator["Pool"]:
    """Processes that compile for ``target`` (``"sm_90"``, with or without a GPU's name); stopped at the end."""
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_begin, initargs=(target, multiprocessors)
    ) as executor:
        try:
            yield Pool(executor)
        finally:
            executor.shutdown(cancel_futures=True)


class Pool:
    """Compilations that were asked for, in order."""

    def __init__(self, executor: ProcessPoolExecutor):
        self.executor = executor

    def compile(self, op: str, kind: str, candidates: Sequence[Settings]) -> "list[Future[Compiled]]":
        """Begin to compile the candidates of one kind of problem."""
        return [self.executor.submit(_compile, op, kind, dict(settings)) for settings in candidates]


def outcome(future: "Future[Compiled]", timeout: float | None = None) -> Compiled:
    """What became of a candidate; one whose process died counts as failed.

    Raises:
        TimeoutError: not yet known after ``timeout`` seconds.
    """
    try:
        return future.result(timeout)
    except BrokenProcessPool as error:
        return Compiled(error=f"the process that compiled it died ({error})")


def _begin(target: str, multiprocessors: int) -> None:
    """In a new process, before Triton is imported: everything that a launch asks a GPU for comes from here."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "no launch settings were measured")  # the process that measures says it
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from orthorank_kernels import dispatch
    from orthorank_kernels.triton import configs

    driver.set_active(AbsentGpu(target.split(" ")[0]))
    configs.target_of = lambda device: target
    configs._multiprocessors = lambda device: multiprocessors
    dispatch.triton_unavailable = lambda device: None
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        _COMPILED.append(kernel)
        return kernel

    JITFunction.run = compile_only


_COMPILED: list[Any] = []


def _compile(op: str, kind: str, settings: Settings) -> Compiled:
    """In a process that `_begin` prepared."""
    _COMPILED.clear()
    run = tuning_problems.PROBLEMS[op].run(kind, tuning_problems.Blank(torch.device("cpu")))
    try:
        with _settings.overridden(op, kind, settings):
            run()
    except Exception as error:  # the compiler's errors are of many kinds, and each is an answer
        return Compiled(error=f"{type(error).__name__}: {error}"[:500])
    return Compiled(len(_COMPILED), max((kernel.metadata.shared for kernel in _COMPILED), default=0))


def multiprocessors_of(device: torch.device) -> int:
    """Of a GPU: launches ask for them, so what is compiled depends on them."""
    return _library.launcher("configs._multiprocessors")(device)
