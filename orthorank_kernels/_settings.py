"""Launch settings as data: a JSON file for each op and device, and their look-up.

A device is a family of GPUs, for which `configs/` holds a default chosen from registers, spills and shared memory of
the compiled kernels, or one GPU by its name, for which `orthorank-kernels tune` measures. A file:

    {"device": "hopper", "op": "sparse_query_attention",
     "settings": {"16-bit, head_dim 64": {"block_m": 128, "block_n": 128, "num_stages": 2, "num_warps": 8}, ...}}

The keys of ``settings`` name kinds of problems (dtype, head_dim; never a length). Of several files with settings for
one kind the first of these counts: the folder ``ORTHORANK_CONFIG_DIR``, the user's configuration folder, the file of
the GPU in `configs/`, the file of its family there.

A target is a string: an architecture (``"sm_90"``, ``"gfx942"``) or ``"interpreter"``, and after a space the name of
the GPU where it is known: ``"sm_90 NVIDIA H100 80GB HBM3"``.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

SHIPPED = Path(__file__).with_name("configs")
INTERPRETER = "interpreter"

Settings = Mapping[str, int]
NAMES = {"block_m", "block_n", "num_stages", "num_warps"}
_OVERRIDES: dict[tuple[str, str], Settings] = {}


class SettingsError(ValueError):
    """A file with launch settings cannot be used. The message names the file, the fault and the remedy."""


def look_up(op: str, kind: str, target: str) -> Settings:
    """Settings of ``op`` for one kind of problem: measured on this GPU, or the default of its family.

    >>> look_up("sparse_query_attention", "16-bit, head_dim 128", "sm_90")["block_m"]
    128
    """
    if _OVERRIDES and (op, kind) in _OVERRIDES:
        return _OVERRIDES[op, kind]
    name = gpu_name(target)
    if not name:
        return default(op, kind, target)
    measured = _measured(op, name)
    if kind in measured:
        return measured[kind]
    if os.environ.get("ORTHORANK_AUTOTUNE") == "1":
        from orthorank_kernels.tuning import at_first_launch  # measures by launching, so it comes back here

        measured[kind] = at_first_launch(op, kind, target)
        return measured[kind]
    _warn_untuned(name)
    return default(op, kind, target)


def default(op: str, kind: str, target: str) -> Settings:
    """Settings for GPUs that nobody measured: those of the family."""
    return _shipped(op, family(target))[kind]


def family(target: str) -> str:
    """Targets that share default settings.

    >>> family("sm_86"), family("sm_90 NVIDIA H100 80GB HBM3"), family("gfx942")
    ('ampere-small', 'hopper', 'amd')
    """
    architecture = target.split(" ")[0]
    if architecture == INTERPRETER:
        return INTERPRETER
    if not architecture.startswith("sm_"):
        return "amd"
    capability = int(architecture.removeprefix("sm_"))
    if 90 <= capability < 120:
        return "hopper" if capability < 100 else "blackwell"
    if capability >= 80:  # 80 and 87 have 163 KiB of shared memory for a program; 86, 89 and 120 have 99
        return "ampere" if capability in (80, 87) else "ampere-small"
    return "volta"


def gpu_name(target: str) -> str:
    """The name of the GPU in a target, or an empty string."""
    return target.partition(" ")[2]


def file_name(op: str, device: str) -> str:
    """Of the settings of an op on a family or a GPU.

    >>> file_name("sparse_query_attention", "NVIDIA H100 80GB HBM3")
    'sparse_query_attention.nvidia-h100-80gb-hbm3.json'
    """
    return f"{op}.{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"


def user_folder() -> Path:
    """Where `orthorank-kernels tune` writes: ``ORTHORANK_CONFIG_DIR``, or the user's configuration folder."""
    if given := os.environ.get("ORTHORANK_CONFIG_DIR"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base) / "orthorank-kernels"


def read(path: Path) -> dict[str, dict[str, int]]:
    """Settings by kind of problem, from one file; empty if there is none.

    Raises:
        SettingsError: it is no file of settings.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    try:
        settings = json.loads(text)["settings"]
        if missing := sorted({f"{kind}: {n}" for kind, values in settings.items() for n in NAMES - set(values)}):
            raise LookupError(f"no {missing[0]}")
        if all(type(n) is int and n > 0 for values in settings.values() for n in values.values()):
            return settings
        fault = "a setting is not an int above 0"
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        fault = f"{type(error).__name__}: {error}"
    raise SettingsError(
        f"{path} holds no launch settings ({fault}); delete it, or write it anew with: orthorank-kernels tune"
    )


@contextlib.contextmanager
def overridden(op: str, kind: str, settings: Settings) -> Iterator[None]:
    """Inside, `look_up` gives these settings for one kind of problem."""
    _OVERRIDES[op, kind] = settings
    try:
        yield
    finally:
        del _OVERRIDES[op, kind]


def forget() -> None:
    """Read the files again at the next look-up."""
    for cached in (_shipped, _measured, _warn_untuned):
        cached.cache_clear()


@lru_cache
def _shipped(op: str, device: str) -> dict[str, dict[str, int]]:
    return read(SHIPPED / file_name(op, device))


@lru_cache
def _measured(op: str, name: str) -> dict[str, Settings]:
    """What was measured on the GPU ``name``, kind by kind from the nearest folder."""
    return {**_shipped(op, name), **read(user_folder() / file_name(op, name))}


@lru_cache
def _warn_untuned(name: str) -> None:
    """Once for each GPU and process."""
    warnings.warn(
        f"no launch settings were measured on {name}: kernels run with the defaults of its family; to measure, run: "
        "orthorank-kernels tune",
        stacklevel=2,
    )
