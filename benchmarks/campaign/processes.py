"""A child process in a process group of its own, with a limit, its output in a file."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

KEPT = 2000  # characters of a process's last words


@dataclass
class Tail:
    """A growing file, of which the new part is read each time."""

    path: Path
    at: int = 0

    def new(self, *, whole_lines: bool = False) -> bytes:
        """What was written since the last call; with ``whole_lines`` up to the last end of a line."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self.at)
            found = file.read()
        if whole_lines:
            found = found[: found.rfind(b"\n") + 1]
        self.at += len(found)
        return found


@dataclass
class Running:
    """A command that was started: ``ended`` is None until it has, then "ok", "exit N", "signal N" or "killed"."""

    name: str
    command: Sequence[str]
    output: Path
    limit: float
    environment: Mapping[str, str]
    folder: Path
    began: float = field(default_factory=time.monotonic)
    ended: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                self.command, cwd=self.folder, env=dict(self.environment), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Whether it has ended; kills it, with everything that it started, when its time is over."""
        code = self.process.poll()
        self.seconds = time.monotonic() - self.began
        if code is None and self.seconds < self.limit:
            return False
        self.kill()
        if code is None:
            self.ended = f"killed after {self.seconds:.0f} s"
        else:
            self.ended = "ok" if code == 0 else f"exit {code}" if code > 0 else f"signal {-code}"
        return True

    def kill(self) -> None:
        """End the whole group: the process, and what it left running; in groups of their own, too."""
        others = descendants(self.process.pid) if self.process.returncode is None else []
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        for number in others:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(number, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout=5)  # a process inside the driver may take its time; nothing here waits longer

    def said(self) -> str:
        """Its last words."""
        return self.output.read_text(encoding="utf-8", errors="replace")[-KEPT:].strip()


def descendants(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """Processes that ``pid`` and its children started and that still run; none where there is no /proc to read."""
    parents: dict[int, int] = {}
    for status in proc.glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
    found, new = [], {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new}
        found += sorted(new)
    return found
