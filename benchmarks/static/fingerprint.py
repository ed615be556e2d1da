"""What a case's measurement depends on, as a hash: it says whether a committed figure is still that of the sources.

It covers the sources that the launcher imports, their default settings, the arguments of the case, the code that
measures, the target and the version of Triton. Comments and docstrings do not count, so that notes can be added to a
kernel without compiling everything again.
"""

import ast
import dataclasses
import functools
import hashlib
import inspect
import io
import json
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.static.case import IN_FLIGHT_LIMIT, Case

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "orthorank_kernels"
MEASURING = [Path(__file__).with_name(name) for name in ("sass.py", "measure.py", "occupancy.py")]
IN_FLIGHT = Path(__file__).with_name("in_flight.py")  # measures cases that have a limit on it
SETTINGS = PACKAGE / "settings" / "lookup.py"  # reads the default launch settings
SHARED = (SETTINGS, PACKAGE / "layout.py")  # what kernels and launchers use of the rest of the package
VENDORS = ("nvidia-", "amd-")  # settings tuned on one GPU start so; what is compiled here takes those of a family


def keys(case: Case, targets: Iterable[str], triton_version: str) -> dict[str, str]:
    """Of one case on each target, as 16 hexadecimal digits."""
    text = _case_text(case)
    return {target: digest(text, target, triton_version) for target in targets}


def _case_text(case: Case) -> str:
    asked = "\n".join(describe(case.launch))
    sources = launched_sources(asked) if case.group != "peers" else [Path(__file__).with_name("flex.py")]
    code = [code_of(path) for path in sources]
    settings = _settings("\n".join(code)) if SETTINGS in sources else ""
    return digest(case.group, case.name, asked, *code, *map(code_of, measuring(case)), settings)


def measuring(case: Case) -> list[Path]:
    """The files that say what is measured of a case."""
    return [*MEASURING, IN_FLIGHT] if any(IN_FLIGHT_LIMIT in limits for limits in case.at.values()) else MEASURING


def describe(value: Any) -> Iterator[str]:
    """A value that a case's launch closes over, in words that are the same in every process."""
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{list(value.shape)}{list(value.stride())}+{value.storage_offset()}"
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        yield repr(value)
    elif isinstance(value, (list, tuple, set, frozenset)):
        for item in value if isinstance(value, (list, tuple)) else sorted(value, key=repr):
            yield from describe(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield f"{name}="
            yield from describe(item)
    elif isinstance(value, functools.partial):
        yield from describe((value.func, value.args, value.keywords))
    elif dataclasses.is_dataclass(value):
        yield from describe({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif callable(value):
        yield from _describe_function(value)
    else:
        raise TypeError(f"a case closes over a {type(value).__name__}, of which no fingerprint is taken")


def _describe_function(function: Callable[..., Any]) -> Iterator[str]:
    yield f"{function.__module__}.{function.__qualname__}"
    file = inspect.getsourcefile(function)
    if file is not None and function.__module__ != "benchmarks.static.case":
        yield digest(code_of(Path(file)))
    yield from describe(getattr(function, "__defaults__", None) or ())
    cells = getattr(function, "__closure__", None) or ()
    yield from describe([cell.cell_contents for cell in cells])


def launched_sources(asked: str) -> list[Path]:
    """Files that the launchers named in ``asked`` (``'module.function'``) import; without any, all kernels."""
    named = {PACKAGE / "triton" / f"{m[1]}.py" for m in re.finditer(r"'(\w+)\.\w+'", asked)}
    return imported({path for path in named if path.exists()} or set((PACKAGE / "triton").glob("*.py")))


def imported(paths: set[Path]) -> list[Path]:
    """``paths`` and the files with kernels, launchers and what they share that they import, directly or not."""
    found, work = set(paths), list(paths)
    while work:
        for path in _imports(work.pop()) - found:
            found.add(path)
            work.append(path)
    return sorted(found)


@functools.cache
def _imports(path: Path) -> frozenset[Path]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    files = {ROOT / (name.replace(".", "/") + ".py") for name in names}
    return frozenset(file for file in files if file.exists() and (file.parent == PACKAGE / "triton" or file in SHARED))


@functools.cache
def code_of(path: Path) -> str:
    """A source file without comments, docstrings and empty lines."""
    return stripped(path.read_text(encoding="utf-8"))


def stripped(source: str) -> str:
    """``source`` without comments, docstrings and empty lines.

    >>> stripped("def f():\\n    '''About it.'''\\n\\n    return 1  # one\\n")
    'def f():\\n    return 1'
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)):
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and type(first.value.value) is str:
                lines[first.lineno - 1 : first.end_lineno] = [""] * (first.end_lineno - first.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


@functools.cache
def _settings(code: str) -> str:
    """Default launch settings of the ops that ``code`` looks up, by file."""
    files = sorted(SETTINGS.with_name("configs").glob("*.json"))
    shipped = [f for f in files if not f.name.split(".")[1].startswith(VENDORS)]
    used = [f for f in shipped if f'look_up("{f.name.split(".")[0]}"' in code or "look_up(op," in code]
    return json.dumps({f.name: json.loads(f.read_text(encoding="utf-8")) for f in used}, sort_keys=True)


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
