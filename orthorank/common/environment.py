"""What this machine and installation are: versions, devices, and the backend that each op takes."""

import os
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

DISTRIBUTIONS = ("orthorank-kernels", "torch", "triton", "transformers", "tokenizers", "gguf", "numpy")


@dataclass(frozen=True)
class OpBackend:
    """Which implementation ``backend="auto"`` takes for one op on one device, and why."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Environment:
    """Versions (None: not installed), processor, threads and devices.

    >>> environment().versions["torch"] is not None
    True
    """

    python: str
    platform: str
    versions: dict[str, str | None]
    processor: str
    threads: int
    devices: list[str]

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON stores them."""
        return asdict(self)


def environment() -> Environment:
    """This machine and installation."""
    import torch

    gpus = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return Environment(
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        versions={name: version_of(name) for name in DISTRIBUTIONS},
        processor=_processor(),
        threads=torch.get_num_threads(),
        devices=["cpu", *gpus],
    )


def op_backends(device: str) -> list[OpBackend]:
    """For each public op of `orthorank_kernels`, the backend that ``"auto"`` takes on ``device`` and why.

    >>> {choice.backend for choice in op_backends("cpu")}
    {'torch'}
    """
    import inspect

    import orthorank_kernels
    from orthorank_kernels.dispatch import describe

    backend, reason = describe(device)
    ops = [
        name
        for name in orthorank_kernels.__all__
        if callable(op := getattr(orthorank_kernels, name)) and "backend" in inspect.signature(op).parameters
    ]
    return [OpBackend(op, device, backend, reason) for op in ops]


def version_of(distribution: str) -> str | None:
    """The installed version; None: it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """The processor's own name where Linux tells it, and the number of logical cores."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
