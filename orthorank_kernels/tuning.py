"""Launch settings measured on the GPU at hand: ``orthorank-kernels tune``, and ``ORTHORANK_AUTOTUNE=1``.

Four steps, a short function each: `orthorank_kernels._settings.look_up` and its ``default``; `candidates` and `tune`
here. A candidate that the GPU cannot launch or that gives another result than the default is left out, and the default
stays where none is faster by more than `MARGIN`. Kinds of problems are those of the settings' files: none depends on a
length, so what was measured once serves every prompt.
"""

import contextlib
import itertools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels import _library, _settings
from orthorank_kernels._settings import Settings
from orthorank_kernels.attention import sparse_query_attention
from orthorank_kernels.dispatch import triton_unavailable

MARGIN = 0.02  # of the time; closer than that two settings are the same to a clock
MOST_REGISTERS = 160  # of a thread, for float32 accumulators and scores; with more of them it spills
SHARED_KIB = {"volta": 64, "ampere": 163, "ampere-small": 99, "hopper": 227, "blackwell": 227, "amd": 64}
KIND = re.compile(r"(\d+)-bit, head_dim (\d+)(?:, (\d+) rows)?")
TOKENS, KV_HEADS, GROUP = 8192, 8, 4  # of the problems that are timed


class TuningError(RuntimeError):
    """Nothing can be measured here. The message says why and what would help."""


@dataclass(frozen=True)
class Tuned:
    """What was measured for one kind of problem: the fastest settings, their time, and that of the default."""

    settings: Settings
    milliseconds: float
    default_milliseconds: float


def kinds(op: str) -> list[str]:
    """The kinds of problems that ``op`` has settings for."""
    return list(_settings.read(_settings.SHIPPED / _settings.file_name(op, "hopper")))


def tunable() -> list[str]:
    """The ops that have launch settings as data.

    >>> tunable()
    ['sparse_query_attention']
    """
    return sorted(path.name.removesuffix(".hopper.json") for path in _settings.SHIPPED.glob("*.hopper.json"))


def candidates(op: str, kind: str, target: str) -> Iterator[Settings]:
    """Settings worth a measurement, the default first.

    Known to lose, and left out, is what spills (accumulators and scores are ``block_m * (head_dim + block_n)`` float32
    numbers over all threads) and what shared memory does not hold (each stage has a block of K and one of V).
    """
    default, family = _settings.default(op, kind, target), _settings.family(target)
    bits, head_dim, rows = _parse(kind)
    yield default
    for block_m, block_n, warps, stages in itertools.product(
        (rows,) if rows else (64, 128),
        (16, 32, 64) if bits == 32 else (32, 64, 128),
        (2, 4, 8) if rows else (4, 8),
        (1, 2) if family in ("volta", "amd") else (2, 3, 4),  # no loads that run ahead there
    ):
        threads = warps * (64 if family == "amd" else 32)
        fits = stages * 2 * block_n * head_dim * bits // 8 <= SHARED_KIB[family] << 10
        if fits and block_m * (head_dim + block_n) <= MOST_REGISTERS * threads:
            tile = {"block_m": block_m, "block_n": block_n, "num_warps": warps, "num_stages": stages}
            if {**default, **tile} != default:
                yield {**default, **tile}


def tune(op: str, kind: str, device: torch.device) -> Tuned:
    """Time the candidates for one kind of problem on ``device``; takes a compilation of seconds for each."""
    target, run = _library.launcher("configs.target_of")(device), _problem(kind, device)
    measure = _library.launcher("timing.milliseconds")
    offered = list(candidates(op, kind, target))
    times: list[float] = []
    expected: Tensor | None = None
    for settings in offered:
        with _settings.overridden(op, kind, settings):
            result, time = measure(run)
        if expected is None:
            if result is None:
                raise TuningError(f"{op}, {kind}: {target} cannot launch the default settings {dict(settings)}")
            expected = result
        agrees = result is not None and torch.allclose(result, expected, rtol=2e-2, atol=2e-3)
        times.append(time if agrees else float("inf"))
    best = min(range(len(times)), key=lambda number: times[number])
    if times[best] > times[0] * (1 - MARGIN):
        best = 0
    return Tuned(offered[best], times[best], times[0])


def save(op: str, name: str, tuned: dict[str, Tuned], folder: Path) -> Path:
    """Add what was measured on the GPU ``name`` to its file in ``folder``, which is a whole file at any time."""
    path = folder / _settings.file_name(op, name)
    content: dict[str, Any] = {"settings": {}, "milliseconds": {}}
    if _settings.read(path):
        content |= json.loads(path.read_text(encoding="utf-8"))
    content |= {"device": name, "op": op, "versions": _versions()}
    for kind, found in tuned.items():
        content["settings"][kind] = dict(found.settings)
        content["milliseconds"][kind] = {"tuned": found.milliseconds, "default": found.default_milliseconds}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.write("\n")
    os.replace(file.name, path)
    _settings.forget()
    return path


def at_first_launch(op: str, kind: str, target: str) -> Settings:
    """Settings for a GPU that nobody measured, with ``ORTHORANK_AUTOTUNE=1``: measured now, and kept for the next time.

    The default where that cannot be done: while a graph is captured, or when the measurement fails.
    """
    default = _settings.default(op, kind, target)
    if torch.cuda.is_current_stream_capturing():
        return default
    try:
        tuned = tune(op, kind, gpu_of(target))
    except TuningError as error:
        warnings.warn(f"ORTHORANK_AUTOTUNE: {error}; the default settings are used", stacklevel=2)
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


def _problem(kind: str, device: torch.device) -> Callable[[], Tensor]:
    """A launch of that kind: a third of a long prompt, or a few queries over it."""
    bits, head_dim, rows = _parse(kind)
    dtype = torch.float32 if bits == 32 else torch.bfloat16
    queries = max(1, rows // GROUP) if rows else TOKENS // 3
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    q = random(2, queries, KV_HEADS * GROUP, head_dim).transpose(1, 2)
    k, v = (random(2, KV_HEADS, TOKENS, head_dim) for _ in range(2))
    positions = torch.linspace(0, TOKENS - 1, queries, device=device).round().to(torch.int32).expand(2, -1).contiguous()
    return lambda: sparse_query_attention(q, k, v, positions, backend="triton")


def _parse(kind: str) -> tuple[int, int, int]:
    """Bits of a number, head_dim, and rows of a tile that few queries leave (0: many)."""
    found = KIND.fullmatch(kind)
    if found is None:
        raise ValueError(f"kind is {kind!r}; it must be as {KIND.pattern!r}")
    bits, head_dim, rows = (int(number or 0) for number in found.groups())
    return bits, head_dim, rows


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in ("orthorank-kernels", "torch", "triton") if _is_installed(name)}


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
