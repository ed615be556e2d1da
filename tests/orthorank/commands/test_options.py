"""Options of commands that have the names of their settings' fields: each reaches its own, under a debugger, too."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from orthorank.analysis import job
from orthorank.commands import analyze, search
from orthorank.search import run

SEARCH = {
    "model": "some/model", "method": "one-shot", "metric": "taylor", "keep_ratio": "1/4", "sparsity": "20%",
    "text": Path("a.txt"), "windows": 3, "window": 99, "protect_first": 5, "protect_last": 6, "sink_layer": 2,
    "criterion": "random", "select": "window", "select_window": 48, "output": Path("out"), "resume": True,
    "bos": "none", "device": "cpu", "dtype": "float16", "batch_size": 7, "memory": 1.5,
}  # fmt: skip
GREEDY = {
    "layers": 4, "dataset": "c4", "no_sink_floor": True, "fast": True, "correct": 8, "fit_windows": 9,
    "max_loss": "0.05", "device_map": "auto",
}  # fmt: skip
ANALYZE = {
    "model": "some/model", "text": Path("a.txt"), "output": Path("out"), "plan": ["a", "b"], "criterion": "random",
    "passages": 3, "passage_tokens": 99, "windows": 5, "window": 77, "keep_ratio": "25%", "bos": "none",
    "device": "cpu", "dtype": "float16",
}  # fmt: skip


class Reached(Exception):
    """Raised in place of the work."""


@contextmanager
def debugged() -> Iterator[None]:
    """Inside, every frame's variables are looked at, as a debugger does."""

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        assert frame.f_locals is not None
        return look

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    finally:
        sys.settrace(before)


def settings_of(patch: pytest.MonkeyPatch, command: Any, module: Any, work: str, options: dict[str, Any]) -> Any:
    def reached(settings: Any, screen: Any) -> None:
        raise Reached(settings)

    patch.setattr(module, work, reached)
    patch.setattr(search, "find_text", lambda path: None)
    patch.setattr(search, "remark_on", lambda text: None)
    with pytest.raises(Reached) as stopped, debugged():
        command(**options)
    return stopped.value.args[0]


@pytest.mark.parametrize("options", [SEARCH, GREEDY])
def test_options_of_search(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    settings = settings_of(monkeypatch, search.command, run, "run_search", options)
    read = {"keep_ratio": 0.25, "sparsity": 0.2, "max_loss": 0.05}
    for name, value in options.items():
        if name == "no_sink_floor":
            assert settings.sink_floor is False
        else:
            assert getattr(settings, name) == read.get(name, value), name


def test_the_two_together_are_all_options_of_search() -> None:
    assert SEARCH.keys() | GREEDY.keys() == search.command.__annotations__.keys() - {"return"}


def test_options_of_analyze(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ANALYZE.keys() == analyze.command.__annotations__.keys() - {"return"}
    settings = settings_of(monkeypatch, analyze.command, job, "run_analysis", ANALYZE)
    for name, value in ANALYZE.items():
        if name == "plan":
            assert settings.plans == ("a", "b")
        else:
            assert getattr(settings, name) == (0.25 if name == "keep_ratio" else value), name
