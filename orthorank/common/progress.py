"""What a run tells its watcher. The terminal's side of it is in `orthorank.commands`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Protocol

Advance = Callable[[int, str], None]


class Screen(Protocol):
    """Someone who watches a run."""

    def heading(self, title: str) -> None:
        """A step begins."""

    def say(self, words: str) -> None:
        """Something is known."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Work of ``total`` parts; inside, ``advance(done, note)`` says how far it is."""


class SilentScreen:
    """Shows nothing: for code that no terminal watches.

    >>> with SilentScreen().progress("search", 3) as advance:
    ...     advance(1, "one done")
    """

    def heading(self, title: str) -> None:
        """Nothing."""

    def say(self, words: str) -> None:
        """Nothing."""

    def progress(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Nothing, with an ``advance`` that does nothing."""
        return nullcontext(lambda done, note: None)


def say_replaced(screen: Screen, folder: Path | None, *names: str) -> None:
    """Say which files of an earlier run in ``folder`` this one replaces at its end; None: it writes nowhere."""
    if folder is not None and (found := [str(folder / name) for name in names if (folder / name).exists()]):
        screen.say(f"Replaces at its end: {', '.join(found)}.")
