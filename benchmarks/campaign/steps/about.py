"""Versions, the card, and the two ceilings that every later rate is compared with: a copy and a matrix product."""

import hashlib
import platform
import statistics
import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.campaign.measure import Context, eager, repeated, warm
from benchmarks.campaign.summary import spread

SMI = (
    "nvidia-smi", "--query-gpu=driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu",
    "--format=csv,noheader",
)  # fmt: skip
SECONDS = 1.0  # of each ceiling


def run(context: Context) -> None:
    machine = context.machine
    known = {
        **machine.facts(),
        "libtriton": library_hash(),
        "CPU": cpu_name(),
        "AMX": amx_flags(),
        "driver, clocks, power limit, temperature": said(SMI),
    }
    for what, value in known.items():
        context.lines.write(kind="fact", what=what, value=value)
    warm(machine, context.sizes.warm, context.sizes.product)
    copy(context)
    machine.free()
    product(context)
    context.lines.write(kind="fact", what="the same after the ceilings", value=said(SMI))


def copy(context: Context) -> None:
    """Bytes: half of ``sizes.copy`` read, and as many written."""
    source = torch.ones(context.sizes.copy // 4, dtype=torch.int16, device=context.machine.device)
    target = torch.empty_like(source)
    ceiling(context, "copy", "GB/s", 2 * source.numel() * source.element_size(), lambda: target.copy_(source))


def product(context: Context) -> None:
    """Of two square matrices of random numbers: zeros and ones would draw less power, and so run faster."""
    size, machine = context.sizes.product, context.machine
    a, b = (torch.randn(size, size, device=machine.device).to(machine.dtype) for _ in range(2))
    ceiling(context, "product", "TFLOP/s", 2.0 * size**3, lambda: torch.mm(a, b))


def ceiling(context: Context, what: str, unit: str, amount: float, call: Callable[[], object]) -> None:
    found = repeated([eager(context.machine, call, [])], SECONDS * min(1.0, context.sizes.warm))
    median = statistics.median(found)
    rate = amount / median / {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
    fields = {"median_us": median * 1e6, "spread": spread(found), "n": len(found), "amount": amount}
    context.lines.write(kind="ceiling", what=what, rate=rate, unit=unit, **fields)


def library_hash() -> str:
    """The beginning of libtriton.so's sha256: kernels compiled elsewhere with the same one can be carried here."""
    found = find_spec("triton")
    libraries = list(Path(found.origin).parent.glob("_C/libtriton*.so")) if found and found.origin else []
    return hashlib.sha256(libraries[0].read_bytes()).hexdigest()[:16] if libraries else "none"


def cpu_name(path: Path = Path("/proc/cpuinfo")) -> str:
    return first_of(path, "model name") or platform.processor() or "unknown"


def amx_flags(path: Path = Path("/proc/cpuinfo")) -> str:
    return " ".join(word for word in first_of(path, "flags").split() if word.startswith("amx")) or "none"


def first_of(path: Path, name: str) -> str:
    """The value of a name in a file as /proc has it; empty where there is none."""
    if not path.exists():
        return ""
    found = (line.partition(":") for line in path.read_text(encoding="utf-8").splitlines())
    return next((value.strip() for key, _, value in found if key.strip() == name), "")


def said(command: Sequence[str]) -> str:
    """What a program says of the card; what is wrong with it where it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    return (done.stdout or done.stderr).strip()
