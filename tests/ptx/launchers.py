"""Runs the launchers of `orthorank_kernels.triton` on CPU tensors: ``kernel[grid](...)`` compiles for a GPU that need
not be present and runs the PTX here.

So what runs is what the launcher launches: its argument specialisation and its launch settings are not repeated. Only
in a process of its own (`worker`), because this replaces Triton's driver, and without the interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.static.worker import AbsentGpu
from ptx_check.global_memory import GlobalMemory
from ptx_check.launch import Argument, Descriptor, launch
from ptx_check.scheduler import Trace
from ptx_check.table import Program

SWIZZLE_BYTES = (0, 32, 64, 128)  # by Triton's number for it


@dataclass
class Settings:
    """How kernels run. ``edit`` may return another program instead of the one compiled: to break it on purpose;
    ``only_compile``: none runs, and results hold nothing."""

    seed: int | None = None
    resident: int = 1
    trace: Trace | None = None
    edit: Callable[[str], Program] | None = None
    only_compile: bool = False
    launches: list["Launch"] = field(default_factory=list)


@dataclass(frozen=True)
class Launch:
    """One launch that was run."""

    name: str
    ptx: str
    steps: int
    grid: tuple[int, ...]


_PROGRAMS: dict[str, Program] = {}


def program_of(ptx: str) -> Program:
    """A decoded program, kept: most launches of a process are of few kernels."""
    if ptx not in _PROGRAMS:
        _PROGRAMS[ptx] = Program(ptx)
    return _PROGRAMS[ptx]


def run_instead_of_launch(target: str) -> Settings:
    """From now on ``kernel[grid](...)`` compiles for ``target`` (sm_80 ...) and runs the PTX by the settings returned.

    Compiling stops at PTX: no machine code is made. Triton's cache keeps such kernels apart from complete ones.
    """
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from orthorank_kernels.triton import configs

    def stop_at_ptx(backend: Any = None, stages: Any = None, *_: Any) -> tuple[str, str] | None:
        if stages is None:
            return "ptx only", "ptx only"
        stages["cubin"] = lambda source, metadata: b"none"
        return None

    driver.set_active(AbsentGpu(target))
    knobs.runtime.add_stages_inspection_hook = stop_at_ptx
    configs._gpu_target = lambda index: target
    configs.target_of = lambda device: target
    settings = Settings()
    compile_kernel = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if warmup:
            return compile_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        kernel = compile_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        values = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        if callable(grid):
            grid = grid(values)
        ptx = kernel.asm["ptx"]
        if settings.only_compile:
            settings.launches.append(Launch(self.fn.__name__, ptx, 0, tuple(grid)))
            return kernel
        program = settings.edit(ptx) if settings.edit else program_of(ptx)
        memory = GlobalMemory()
        steps = launch(
            program,
            grid,
            arguments(kernel, values, memory),
            shared_bytes=kernel.metadata.shared,
            memory=memory,
            seed=settings.seed,
            resident=settings.resident,
            trace=settings.trace,
        )
        settings.launches.append(Launch(self.fn.__name__, ptx, steps, tuple(grid)))
        return kernel

    JITFunction.run = run
    return settings


def arguments(kernel: Any, values: dict[str, Any], memory: GlobalMemory) -> list[Argument]:
    """What a launch passes, in the order of the kernel's parameters: constants and None are compiled in."""
    places = map_tensors({n: v for n, v in values.items() if isinstance(v, torch.Tensor) or hasattr(v, "base")}, memory)
    passed: list[Argument] = []
    descriptors = iter(kernel.metadata.tensordesc_meta or ())
    for name, kind in kernel.src.signature.items():
        value = values.get(name)
        if kind == "constexpr":
            continue
        if kind.startswith("tensordesc"):
            passed += describe(value, next(descriptors), places[name])
        elif isinstance(value, torch.Tensor):
            passed.append(places[name])
        else:
            passed.append(float(value) if kind.startswith("fp") else int(value))
    return passed


def map_tensors(tensors: dict[str, Any], memory: GlobalMemory) -> dict[str, int]:
    """Give each storage a range of addresses. Only what the tensors cover may be touched."""
    storages: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, value in tensors.items():
        x = value if isinstance(value, torch.Tensor) else value.base
        storages.setdefault(x.untyped_storage().data_ptr(), []).append((name, x))
    places = {}
    for views in storages.values():
        storage = views[0][1].untyped_storage()
        data = torch.empty(0, dtype=torch.uint8).set_(storage).numpy()
        allowed = np.zeros(data.size, bool)
        for _, x in views:
            elements = torch.zeros(storage.nbytes() // x.element_size(), dtype=torch.bool)
            elements.as_strided(x.shape, x.stride(), x.storage_offset()).fill_(True)
            covered = np.repeat(elements.numpy(), x.element_size())
            allowed[: covered.size] |= covered
        base = memory.add(" and ".join(name for name, _ in views), data, allowed)
        for name, x in views:
            places[name] = base + x.storage_offset() * x.element_size()
    return places


def describe(value: Any, meta: dict[str, Any], address: int) -> list[Argument]:
    """A tensor descriptor as Triton's launcher passes it: the map, then shape and strides."""
    x = value.base
    box = tuple(reversed(meta["block_size"]))
    strides = tuple(s * x.element_size() for s in reversed(value.strides))
    descriptor = Descriptor(
        address,
        tuple(reversed(value.shape)),
        strides,
        box,
        x.element_size(),
        SWIZZLE_BYTES[meta["swizzle"]],
    )
    return [descriptor, *map(int, value.shape), *map(int, value.strides)]
