"""``results.jsonl``: a line for each result, on the disk before the next one is measured."""

import contextlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Line = dict[str, Any]


class Lines:
    """Appends lines to ``paths``; ``common`` stands in each of them.

    The first path has to be written: an OSError there is raised. The others are copies, which may fail.
    """

    def __init__(self, paths: Sequence[Path], common: Mapping[str, Any]):
        self.paths, self.common = list(paths), dict(common)

    def write(self, **fields: Any) -> Line:
        """Write one line to every path and return it. Numbers that JSON does not know become null."""
        line = {**self.common, **fields, "written": round(time.time(), 3)}
        line = {name: _plain(value) for name, value in line.items()}
        text = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()
        for number, path in enumerate(self.paths):
            with contextlib.nullcontext() if number == 0 else contextlib.suppress(OSError):
                append(path, text)
        return line


def append(path: Path, text: bytes) -> None:
    """One write at the end of the file, then to the disk: several processes may append to one file.

    After a line that was cut off in the middle, a new line begins.
    """
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            text = b"\n" + text
        os.write(file, text)
        os.fsync(file)
    finally:
        os.close(file)


def read(path: Path) -> list[Line]:
    """The lines of a file, without those that were cut off; empty if there is none."""
    if not path.exists():
        return []
    found = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict):
                found.append(line)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
