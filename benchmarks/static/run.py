"""Compiles cases in child processes, because Triton's interpreter replaces its compiler for a whole process."""

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def triton_version() -> str:
    return importlib.metadata.version("triton")


def measurements(
    target: str, group: str, names: Sequence[str], cache: Path | None = None, known: Mapping[str, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The measurements of these cases of one group, as they are made.

    Args:
        known: what the compiler was asked for when a case was measured last, by name. A case of which it is the same
            today gives no measurement but ``case`` and ``asked``.
        cache: Triton's cache folder; an empty one has everything compiled now. None: the usual one.

    Raises:
        RuntimeError: the child process failed, with the end of what it said.
    """
    command = [sys.executable, "-m", "benchmarks.static.worker", target, group, "--names"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONWARNINGS"] = "ignore"  # of peers
    if cache is not None:
        environment["TRITON_CACHE_DIR"] = str(cache)
    child = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdin is not None
    assert child.stdout is not None
    assert child.stderr is not None
    try:
        child.stdin.write(json.dumps({name: (known or {}).get(name) for name in names}))
        child.stdin.close()
        for line in child.stdout:
            yield json.loads(line)
        errors = child.stderr.read()
        if child.wait() != 0:
            raise RuntimeError(f"compiling {group} for {target} failed:\n{errors[-4000:]}")
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        child.stderr.close()
