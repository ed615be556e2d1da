"""Launch settings as data: a JSON file for each op and device, and their look-up.

A device is ``default`` or a family of GPUs, for which `configs/` holds settings chosen from registers, spills and
shared memory of the compiled kernels, or one GPU by its name, for which `orthorank-kernels tune` measures. A file:

    {"device": "hopper", "op": "sparse_query_attention",
     "settings": {"16-bit, head_dim 64": {"block_m": 128, "block_n": 128, "num_stages": 2, "num_warps": 8}, ...}}

The keys of ``settings`` name kinds of problems (dtype, head_dim, a bucket of hidden sizes; never a length). Of several
files with settings for one kind the first of these counts: the folder ``ORTHORANK_CONFIG_DIR``, the user's
configuration folder, the file of the GPU in `configs/`, those of its family and of ``default`` there.

A target is a string: an architecture (``"sm_90"``, ``"gfx942"``) or ``"interpreter"``, and after a space the name of
the GPU where it is known: ``"sm_90 NVIDIA H100 80GB HBM3"``.
"""

import contextlib
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from orthorank_kernels.callers import levels_to_caller

SHIPPED = Path(__file__).with_name("configs")
INTERPRETER = "interpreter"

Settings = Mapping[str, int]
DEFAULT = "default"
# What an op's settings hold, all of it for every kind.
FIELDS = {
    "sparse_query_attention": ("block_m", "block_n", "num_stages", "num_warps"),
    "combine_splits": ("rows", "num_warps"),
    "rms_norm_score": ("num_warps", "enough_programs", "shared_part"),
    "select_tokens": ("tokens", "num_warps"),
    "rms_norm_select": ("tokens",),
    "gather_rows": ("bytes", "num_warps"),
    "scatter_rows_": ("bytes", "num_warps"),
    "gather_add_rms_norm": ("num_warps", "rows", "few_rows"),
    "apply_rotary_at": ("bytes", "num_warps"),
    "silu_and_mul": ("bytes", "num_warps"),
    "add_low_rank": ("block_m", "block_n", "num_warps"),
}
# The smallest and the largest value of each, and whether it must be a power of two: Triton's blocks and warps are.
LEGAL = {
    "block_m": (16, 512, True),
    "block_n": (16, 512, True),
    "num_stages": (1, 8, False),
    "num_warps": (1, 32, True),
    "rows": (1, 1024, True),
    "few_rows": (1, 2**20, False),
    "tokens": (4, 2**14, True),
    "bytes": (16, 2**16, True),
    "enough_programs": (1, 2**20, False),
    "shared_part": (1, 1024, False),
}
_OVERRIDES: dict[tuple[str, str], Settings] = {}
_FOUND: dict[tuple[str, str, str, bool], Settings] = {}
generation = 0  # counts what changes what `look_up` gives, but for the environment


class SettingsError(ValueError):
    """A file with launch settings cannot be used. The message names the file, the fault and the remedy."""


def _nothing_measures(op: str, kind: str, target: str) -> Settings:
    raise SettingsError("nothing was named that measures launch settings; leave ORTHORANK_AUTOTUNE out")


_measure: Callable[[str, str, str], Settings] = _nothing_measures


def measure_by(measure: Callable[[str, str, str], Settings]) -> None:
    """From now on ``measure`` gives the settings that ``ORTHORANK_AUTOTUNE=1`` wants, from op, kind and target."""
    global _measure
    _measure = measure
    _changed()


def look_up(op: str, kind: str, target: str) -> Settings:
    """Settings of ``op`` for one kind of problem: measured on this GPU, or the default of its family.

    >>> look_up("sparse_query_attention", "16-bit, head_dim 128", "sm_90")["block_m"]
    128
    """
    if _OVERRIDES and (op, kind) in _OVERRIDES:
        return _OVERRIDES[op, kind]
    asked = (op, kind, target, os.environ.get("ORTHORANK_AUTOTUNE") == "1")
    found = _FOUND.get(asked)
    if found is None:
        found = _FOUND[asked] = _found(*asked)
    return found


def _found(op: str, kind: str, target: str, autotune: bool) -> Settings:
    name = gpu_name(target)
    if not name:
        return default(op, kind, target)
    measured = _measured(op, name)
    if kind in measured:
        return measured[kind]
    if autotune:
        measured[kind] = _measure(op, kind, target)  # by launching, so it comes back here
        _changed()
        return measured[kind]
    _warn_untuned(name)
    return default(op, kind, target)


@lru_cache
def default(op: str, kind: str, target: str) -> Settings:
    """Settings for GPUs that have none of their own: those of the family, or of any.

    >>> default("gather_rows", "rows of 8192 bytes", "sm_90")
    {'bytes': 8192, 'num_warps': 2}
    """
    return _defaults(op, family(target))[kind]


def kinds(op: str) -> list[str]:
    """The kinds of problems that ``op`` has settings for."""
    return list(_defaults(op, "hopper"))


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


def read(path: Path, op: str) -> dict[str, dict[str, int]]:
    """Settings of ``op`` by kind of problem, from one file; empty if there is none.

    Raises:
        SettingsError: it is no file of settings. Says where in the file the fault is.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = content.get("settings") if isinstance(content, dict) else None
        if not isinstance(settings, dict):
            raise ValueError("it is no object with an object of 'settings'")
        for kind, values in settings.items():
            _check(op, kind, values)
        return settings
    except FileNotFoundError:
        return {}
    except RecursionError:
        fault = "it is nested too deeply"
    except UnicodeDecodeError as error:
        fault = f"byte {error.start} is no UTF-8"
    except OSError as error:
        fault = error.strerror or str(error)
    except ValueError as error:
        fault = str(error)
    raise SettingsError(
        f"{path} holds no launch settings ({fault}); delete it, or write it anew with: orthorank-kernels tune"
    )


def _check(op: str, kind: str, values: dict[str, int]) -> None:
    """Raises ValueError unless ``values`` are settings of ``op``."""
    if not isinstance(values, dict):
        raise ValueError(f"{kind!r} is {values!r}; it must be an object of settings")
    for name in sorted({*FIELDS[op], *values}):
        if name not in FIELDS[op]:
            raise ValueError(f"{kind!r} has {name!r}; settings of {op} are {', '.join(FIELDS[op])}")
        if name not in values:
            raise ValueError(f"{kind!r} has no {name!r}")
        smallest, largest, power = LEGAL[name]
        value = values[name]
        if type(value) is not int or not smallest <= value <= largest or (power and value.bit_count() != 1):
            wanted = "a power of two" if power else "an int"
            raise ValueError(f"{name} of {kind!r} is {value!r}; it must be {wanted} from {smallest} to {largest}")


@contextlib.contextmanager
def overridden(op: str, kind: str, settings: Settings) -> Iterator[None]:
    """Inside, `look_up` gives these settings for one kind of problem."""
    _OVERRIDES[op, kind] = settings
    _changed()
    try:
        yield
    finally:
        del _OVERRIDES[op, kind]
        _changed()


def forget() -> None:
    """Read the files again at the next look-up."""
    for cached in (default, _defaults, _measured, _warn_untuned):
        cached.cache_clear()
    _changed()


def _changed() -> None:
    global generation
    generation += 1
    _FOUND.clear()


@lru_cache
def _defaults(op: str, device: str) -> dict[str, dict[str, int]]:
    return {
        kind: values for name in (DEFAULT, device) for kind, values in read(SHIPPED / file_name(op, name), op).items()
    }


@lru_cache
def _measured(op: str, name: str) -> dict[str, Settings]:
    """What was measured on the GPU ``name``, kind by kind from the nearest folder."""
    file = file_name(op, name)
    return {**read(SHIPPED / file, op), **read(user_folder() / file, op)}


@lru_cache
def _warn_untuned(name: str) -> None:
    """Once for each GPU and process."""
    warnings.warn(
        f"no launch settings were measured on {name}: kernels run with the defaults of its family; to measure, run: "
        "orthorank-kernels tune",
        stacklevel=levels_to_caller(),
    )
