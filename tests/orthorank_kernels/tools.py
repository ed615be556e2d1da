"""What the kernel tests share: devices, tolerances, poisoned outputs, error budgets."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from orthorank_kernels.settings import lookup as _settings

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# One rounding step of a value near 1, by dtype: half the distance between neighbouring numbers there.
ROUNDING = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def set_settings(
    patch: pytest.MonkeyPatch, op: str, by_kind: dict[str, dict[str, int]] | None = None, **all_: int
) -> None:
    """Change launch settings of ``op``: those of some kinds of problems, and of all kinds."""
    for kind in _settings.kinds(op):
        values = {**_settings.default(op, kind, _settings.INTERPRETER), **all_, **(by_kind or {}).get(kind, {})}
        patch.setitem(_settings._OVERRIDES, (op, kind), values)


def budget(eager: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype, steps: int = 0) -> torch.Tensor:
    """Error that a kernel may have: twice that of the same-dtype eager reference, plus one rounding step.

    The kernel sums in another order than the reference, so neither is wrong by itself; both errors have the same
    distribution and a factor 2 on the largest of them bounds the other's in practice.

    Args:
        eager: the reference run in ``dtype``; exact: the reference run in float64 on the same inputs.
        steps: the reference's error counts as at least so many rounding steps of the largest value. For sums of
            hundreds of float32 products, which some processors' libraries sum in wider blocks than others.
    """
    exact = exact.double()
    error = (eager.double() - exact).abs().max() if exact.numel() else torch.zeros((), dtype=torch.float64)
    if steps and exact.numel():
        error = error.clamp(min=steps * ROUNDING[dtype] * exact.abs().max())
    return 2 * error + 2 * ROUNDING[dtype] * exact.abs().clamp(min=1e-6)


def assert_within_budget(
    actual: torch.Tensor,
    eager: torch.Tensor,
    exact: torch.Tensor,
    dtype: torch.dtype,
    name: str = "output",
    steps: int = 0,
) -> None:
    """``actual`` is finite and as close to ``exact`` as `budget` allows, element by element."""
    assert actual.shape == exact.shape, f"{name}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: {int((~torch.isfinite(actual)).sum())} values are not finite"
    error = (actual.double() - exact.double()).abs()
    allowed = budget(eager, exact, dtype, steps)
    worst = (error - allowed).max() if error.numel() else torch.zeros(())
    assert worst <= 0, f"{name}: error {error.max():.3e} exceeds the budget by {worst:.3e}"


@contextlib.contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Inside, `torch.empty` and its kin are filled with NaN (floats) or the largest integer.

    So a value that a kernel forgot to write is seen.
    """
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("error")  # the other function imports Inductor: two seconds a process
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
