"""A pytest plugin for transformers' own tests: every decoder that they build gets a plan that selects every token.

Loaded by its bare name, from this folder, in a process whose ``tests`` is the checkout's. ``1 - 1e-9`` of fewer than a
thousand tokens is all of them, the sink too, but the layers run from their parts and not as they stand; ``keep_last``
is 0, since with it the sink would be left out. Every model class of the four families is patched when its instance is
built. ``EVERY_TOKEN_REPORT`` names a file for one JSON line per test; ``EVERY_TOKEN_PLAN=off`` applies nothing;
``EVERY_TOKEN_SECONDS`` is how long one test may take, after which it fails.
"""

import functools
import importlib
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

FAMILIES = ("llama", "mistral", "qwen2", "gemma3")
LEFT_ALONE = (
    "Vision",
    "ForConditionalGeneration",
    "Gemma3Model",
    "Gemma3ForSequenceClassification",
    "QuestionAnswering",
)
building, handles = threading.local(), []


def patched(init: Callable[..., None]) -> Callable[..., None]:
    """``init`` of a model class, after whose outermost call the plan is applied."""

    @functools.wraps(init)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not getattr(building, "inside", False)
        building.inside = True
        try:
            init(self, *args, **kwargs)
        finally:
            building.inside = not outermost
        if outermost:
            import orthorank

            layers = list(range(self.config.get_text_config().num_hidden_layers))
            plan = orthorank.OrthoRankConfig(layers=layers, keep_ratio=1 - 1e-9, keep_last=0)
            handles.append(orthorank.apply(self, plan))

    return build


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("EVERY_TOKEN_PLAN") == "off":
        return
    from transformers import PreTrainedModel

    for family in FAMILIES:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        for name, cls in list(vars(module).items()):
            ours = isinstance(cls, type) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
            if ours and not name.endswith("PreTrainedModel") and not any(word in name for word in LEFT_ALONE):
                cls.__init__ = patched(cls.__init__)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    seconds = int(os.environ.get("EVERY_TOKEN_SECONDS", "600"))

    def stop(*_: Any) -> None:
        raise TimeoutError(f"{item.name} ran for {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report: Any = yield
    path = os.environ.get("EVERY_TOKEN_REPORT")
    if path and (report.when == "call" or report.outcome != "passed"):
        updated = seen = 0
        for handle in handles:
            for stats in handle.stats.values():
                updated, seen = updated + int(stats.tokens_updated), seen + int(stats.tokens_in)
        handles.clear()
        reason = "" if report.outcome == "passed" else str(report.longrepr).strip().splitlines()
        error = next((line[1:].strip() for line in reversed(reason) if line.startswith("E ")), "") if reason else ""
        line = {
            "test": item.nodeid.split("/")[-1],
            "outcome": report.outcome,
            "error": error or (reason and reason[-1]),
        }
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, "updated": updated, "seen": seen, "seconds": report.duration}) + "\n")
    return report
