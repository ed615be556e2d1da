"""Launch settings measured on the GPU at hand: ``orthorank-kernels tune``, and ``ORTHORANK_AUTOTUNE=1``.

Four steps, a short function each: `orthorank_kernels.settings.lookup.look_up` and its ``default``; `candidates` and
`tune` here. What is tried and timed for each op is in `orthorank_kernels.tuning.problems`. A candidate that the GPU
cannot launch or that gives another result than the default is left out, and the default stays where none is faster by
more than `MARGIN`. Kinds of problems are those of the settings' files: none depends on a length, so what was measured
once serves every prompt.
"""

import contextlib
import json
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels import op as _library
from orthorank_kernels.callers import levels_to_caller
from orthorank_kernels.dispatch import triton_unavailable
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.settings.lookup import Settings
from orthorank_kernels.tuning import problems as tuning_problems

OnCandidate = Callable[[Settings, float | None], None]
MARGIN = 0.02  # of the time; closer than that two settings are the same to a clock


class TuningError(RuntimeError):
    """Nothing can be measured here. The message says why and what would help."""


@dataclass(frozen=True)
class Tuned:
    """What was measured for one kind of problem: the fastest settings, their time, that of the default, and how many
    candidates were timed."""

    settings: Settings
    milliseconds: float
    default_milliseconds: float
    candidates: int = 0


def tunable() -> list[str]:
    """The ops that have launch settings, `combine_splits` among them: the second launch where keys are split.

    >>> tunable()[:3]
    ['add_low_rank', 'apply_rotary_at', 'combine_splits']
    """
    return sorted(_settings.FIELDS)


def candidates(op: str, kind: str, target: str) -> Iterator[Settings]:
    """Settings worth a measurement, the default first."""
    default = _settings.default(op, kind, target)
    yield default
    yield from tuning_problems.search(op, kind, default, _settings.family(target))


def tune(
    op: str,
    kind: str,
    device: torch.device,
    *,
    offered: Iterable[Settings] | None = None,
    until: float = float("inf"),
    on_candidate: OnCandidate | None = None,
) -> Tuned:
    """Time the candidates for one kind of problem on ``device``; each that is not compiled yet takes seconds more.

    Args:
        offered: what to time, the default first; None: all of `candidates`.
        until: time (of `time.monotonic`) after which no candidate is begun, but for the default.
        on_candidate: called with each candidate's settings and its milliseconds, None if it did not run or gave another
            result than the default.

    Raises:
        TuningError: the GPU cannot launch the default.
    """
    target, run = _library.launcher("configs.target_of")(device), tuning_problems.problem(op, kind, device)
    measure = _library.launcher("timing.milliseconds")
    tried: list[Settings] = []
    times: list[float] = []
    expected: Tensor | None = None
    for settings in candidates(op, kind, target) if offered is None else offered:
        if tried and time.monotonic() > until:
            break
        with _settings.overridden(op, kind, settings):
            result, took = measure(run)
        if expected is None:
            if result is None:
                raise TuningError(f"{op}, {kind}: {target} cannot launch the default settings {dict(settings)}")
            expected = result
        agrees = result is not None and torch.allclose(result, expected, rtol=2e-2, atol=2e-3)
        tried.append(settings)
        times.append(took if agrees else float("inf"))
        if on_candidate is not None:
            on_candidate(settings, took if agrees else None)
    best = min(range(len(times)), key=lambda number: times[number])
    if times[best] > times[0] * (1 - MARGIN):
        best = 0
    return Tuned(tried[best], times[best], times[0], len(tried))


def save(op: str, name: str, tuned: dict[str, Tuned], folder: Path) -> Path:
    """Add what was measured on the GPU ``name`` to its file in ``folder``, which is a whole file at any time."""
    path = folder / _settings.file_name(op, name)
    content: dict[str, Any] = {"settings": {}, "milliseconds": {}}
    if _settings.read(path, op):
        content |= json.loads(path.read_text(encoding="utf-8"))
    content |= {"device": name, "op": op, "versions": versions()}
    for kind, found in tuned.items():
        content["settings"][kind] = dict(found.settings)
        times = {"tuned": found.milliseconds, "default": found.default_milliseconds}
        content["milliseconds"][kind] = times | ({"candidates": found.candidates} if found.candidates else {})
    folder.mkdir(parents=True, exist_ok=True)
    whole = json.dumps(content, indent=2, sort_keys=True) + "\n"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        try:
            file.write(whole)
            file.flush()
            os.replace(file.name, path)
        except BaseException:
            with contextlib.suppress(OSError):  # on a disk that fails, this may fail, too
                os.unlink(file.name)
            raise
    _settings.forget()
    return path


def at_first_launch(op: str, kind: str, target: str) -> Settings:
    """Settings for a GPU that has none, with ``ORTHORANK_AUTOTUNE=1``: measured now, and kept for the next time.

    The default where that cannot be done: while a graph is captured, or when the measurement fails.
    """
    default = _settings.default(op, kind, target)
    if torch.cuda.is_current_stream_capturing():
        return default
    try:
        tuned = tune(op, kind, gpu_of(target))
    except TuningError as error:
        warnings.warn(f"ORTHORANK_AUTOTUNE: {error}; the default settings are used", stacklevel=levels_to_caller())
        return default
    with contextlib.suppress(OSError):  # a folder that cannot be written costs the next process the measurement again
        save(op, _settings.gpu_name(target), {kind: tuned}, _settings.user_folder())
    return tuned.settings


def gpu_of(target: str) -> torch.device:
    """A GPU of this machine that is the one of ``target``."""
    target_of = _library.launcher("configs.target_of")
    for index in range(torch.cuda.device_count()):
        if target_of(torch.device("cuda", index)) == target:
            return torch.device("cuda", index)
    raise TuningError(f"no GPU here is {target}")


def check_gpu(device: torch.device) -> None:
    """Raises `TuningError` unless kernels can be timed on ``device``."""
    if device.type != "cuda" or not torch.cuda.is_available():
        raise TuningError(
            f"tuning measures on a GPU, and PyTorch {torch.__version__} sees none on {device}; run it where the model "
            "is served"
        )
    if reason := triton_unavailable(device):
        raise TuningError(reason)
    if (device.index or 0) >= torch.cuda.device_count():
        raise TuningError(f"device is {device}, and PyTorch sees {torch.cuda.device_count()} GPUs here")


def versions() -> dict[str, str]:
    """Of what compiles and launches: settings measured with one Triton need not be the best with another."""
    return {name: metadata.version(name) for name in ("orthorank-kernels", "torch", "triton") if _is_installed(name)}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
