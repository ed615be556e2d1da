"""Quick searches on the tiny saved model, and someone who watches them."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from orthorank.common.texts import find_text, take_samples, tokenize
from orthorank.demo import SilentScreen
from orthorank.search.settings import SearchSettings

ROOT = Path(__file__).parents[2]


def short_text(folder: Path) -> Path:
    """A text beside the tiny model; not the default one, which differs between versions of Python."""
    file = folder / "calibration.txt"
    if not file.exists():
        text = (ROOT / "LICENSE").read_text(encoding="utf-8")
        file.write_text(text[500:] + text[:500], encoding="utf-8")  # on which corrected losses fall first, then rise
    return file


def settings(folder: Path, output: Path, **changes: Any) -> SearchSettings:
    """Two layers of the tiny model's 1 to 4, on three windows of 32 tokens; it has no sink."""
    quick: dict[str, Any] = {
        "text": None if "dataset" in changes else short_text(folder),
        "model": str(folder),
        "output": output,
        "device": "cpu",
        "sink_floor": False,
        "protect_last": 1,
        "layers": 2,
        "windows": 3,
        "window": 32,
        "batch_size": 1,
    }
    return SearchSettings(**(quick | changes))


class Watcher(SilentScreen):
    """Notes what it is told, and presses Ctrl-C after ``stop`` parts of the work called ``title``."""

    def __init__(self, title: str = "", stop: int = -1) -> None:
        self.title, self.stop = title, stop
        self.notes: list[tuple[int, str]] = []
        self.said: list[str] = []

    def say(self, words: str) -> None:
        self.said.append(words)

    def progress(self, title: str, total: int) -> Any:
        def advance(done: int, note: str) -> None:
            self.notes.append((done, note))
            if title == self.title and done == self.stop:
                raise KeyboardInterrupt

        if title == self.title and self.stop == 0:
            raise KeyboardInterrupt
        return nullcontext(advance)


def calibration_ids(folder: Path, tokenizer: Any) -> Any:
    """The windows of `settings`, int64 ``[3, 32]``, cut without the search."""
    tokens = tokenize(find_text(short_text(folder)), tokenizer)
    return take_samples(tokens, windows=3, window=32, held_out_windows=1, held_out_len=32).calibration


def plan_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "orthorank.json").read_text())


def without_times(folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Everything in an output folder that must not depend on interruptions or on how many processes there were."""
    search = json.loads((folder / "search.json").read_text())
    search["results"].pop("seconds")
    search["results"].pop("plan_file")
    state = folder / "search-state.json"
    return plan_in(folder), search, state.read_text() if state.exists() else ""
