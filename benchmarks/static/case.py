"""What is compiled for GPUs that need not be present, and the limits it must keep.

A case calls a launcher with tensors that have shapes, dtypes and strides but no data (device "meta"). So what is
compiled is what the launcher launches: its argument specialisation and its launch settings are not repeated here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from orthorank_kernels import op as _library

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
REPORTED_TARGETS = (*TARGETS, "gfx1100")  # the last without limits: its matrix instructions want other tiles
HALF, FLOAT = torch.bfloat16, torch.float32
# What one block may have. A launch beyond it fails; compiling does not.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
# AMD's assembly is read for what its metadata says. On Blackwell, a warp does not say how large a matrix product is.
UNMEASURED: dict[str, set[str]] = {
    "gfx942": {"instructions", "wide_loads", "wide_stores", "hot_spills", "ntm", "ntm_masked"},
    "sm_100": {"ntm", "ntm_masked"},
}
IN_FLIGHT_LIMIT = "min_in_flight"  # measured only where a case has it: see `in_flight`
MOST_WARPS = {"sm_80": 32, "sm_90": 32, "sm_100": 32, "gfx942": 16}


@dataclass(frozen=True)
class Case:
    """One call of a launcher.

    ``limits`` name entries of a measurement (see `worker`): an upper bound, or with ``min_`` before the name a
    lower one. ``at`` replaces some of them on some targets; None there lifts a limit. What cannot be measured on a
    target (``UNMEASURED``) is not checked there; a measurement that is missing elsewhere breaks its limit.
    """

    group: str  # compiled by one child process, and one test
    name: str
    launch: Callable[[], Any]
    limits: dict[str, float] = field(default_factory=dict)
    at: dict[str, dict[str, float | None]] = field(default_factory=dict)
    slow: bool = False

    def limits_for(self, target: str) -> dict[str, float]:
        limits = {**self.limits, **self.at.get(target, {})}
        return {name: bound for name, bound in limits.items() if bound is not None}


def broken_limits(measured: dict[str, Any], limits: dict[str, float], target: str) -> list[str]:
    """The limits that a measurement breaks, in words; what a GPU itself cannot do is always among them."""
    hard = {"launches": 1, "shared": SHARED_LIMIT[target], "warps": MOST_WARPS[target]}
    broken = []
    for name, bound in {**hard, **limits}.items():
        lower, name = name.startswith("min_"), name.removeprefix("min_")
        value = measured.get(name)
        if name in UNMEASURED.get(target, ()):
            continue
        if value is None:
            broken.append(f"{name} was not measured")
        elif value < bound if lower else value > bound:
            broken.append(f"{name} is {value:.4g}, {'at least' if lower else 'at most'} {bound}")
    return broken


def worst_ratio(measured: dict[str, Any], limits: dict[str, float], target: str) -> tuple[float, str]:
    """How much of its limit the tightest measurement takes (1: all of it), and its name; (0, "") without any.

    Limits that ask for the best there is (no spills, every byte wide) have no ratio: kept, they say nothing of the
    room that is left. Broken, they are infinitely far off.
    """
    worst = (0.0, "")
    for name, bound in limits.items():
        lower, name = name.startswith("min_"), name.removeprefix("min_")
        value = measured.get(name)
        if name in UNMEASURED.get(target, ()) or (bound == 0 and lower):
            continue
        best_there_is = bound == 1 if lower else bound == 0
        if value is None or (best_there_is and value != bound):
            ratio = math.inf
        elif best_there_is:
            continue
        elif lower:
            ratio = bound / value if value else math.inf
        else:
            ratio = value / bound
        worst = max(worst, (ratio, name))
    return worst


def empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launch(path: str, *args: Any) -> Callable[[], Any]:
    """Calls the launcher ``"module.function"`` of `orthorank_kernels.triton`, imported only then."""
    return lambda: _library.launcher(path)(*args)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def some_positions(batch: int, selected: int) -> torch.Tensor:
    return empty(batch, selected, dtype=torch.int32)
