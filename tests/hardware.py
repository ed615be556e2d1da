"""The tests on a real GPU, as a pytest plugin: ``-p tests.hardware`` (see ``benchmarks/on_gpu.py tests``).

- Of the tests that are collected those stay that a GPU can judge: `uses_gpu`.
- After each test the GPU is waited for. An error there (an illegal access, say) belongs to that test, and leaves a
  process in which every later test would fail: the worker ends, and pytest-xdist starts another one.
- ``--hardware-lines FILE``: a line of JSON for each test as soon as it has ended, so that nothing is lost when the run
  is killed. ``--hardware-until SECONDS``: no test begins after this time (as `time.time` counts it).
"""

import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.orthorank_kernels.on_gpu import uses_gpu as _uses_gpu

LOST = 3  # exit code of a process whose GPU context is lost
CRASHED = "???"  # pytest-xdist's phase of a test whose worker ended
MOST = 1500  # characters of an error in a line


def synchronize() -> None:
    """Wait for what was launched; raises RuntimeError with what went wrong on the GPU."""
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def uses_gpu(item: pytest.Item) -> bool:
    """Whether the test's outcome depends on what a GPU computes."""
    return _uses_gpu(item)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tests on a GPU")
    group.addoption("--hardware-lines", type=Path, help="JSON lines, one for each test, as it ends")
    group.addoption("--hardware-until", type=float, default=float("inf"), help="no test begins after this time")


def pytest_configure(config: pytest.Config) -> None:
    watch = Watch(config)
    config.pluginmanager.register(watch, "hardware-watch")
    config.pluginmanager.register(Limit(config.getoption("--hardware-until")), "hardware-limit")
    lines = config.getoption("--hardware-lines")
    if lines is not None and not watch.is_worker:
        config.pluginmanager.register(Lines(lines), "hardware-lines")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept = [item for item in items if uses_gpu(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


class Limit:
    """No test begins after the time given; those left over have no line and no report."""

    def __init__(self, until: float):
        self.until = until

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        return True if time.time() > self.until else None


class Watch:
    """Waits for the GPU after each test, and ends the process when its context is lost."""

    def __init__(self, config: pytest.Config):
        self.is_worker = hasattr(config, "workerinput")
        self.lost = ""

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Generator[None, Any, Any]:
        try:
            return (yield)
        finally:
            try:
                synchronize()
            except RuntimeError as error:
                self.lost = f"the GPU reports an error after {item.nodeid}: {error}"
                raise RuntimeError(self.lost) from error

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self) -> Generator[None, Any, Any]:
        result = yield
        if self.lost and self.is_worker:
            os._exit(LOST)  # reports are sent: nothing after them can be trusted
        if self.lost:
            pytest.exit(self.lost, returncode=LOST)
        return result


class Lines:
    """Writes a line when a test ends; in the process that gathers the workers' reports."""

    def __init__(self, path: Path):
        self.path, self.open = path, {}
        self.counts = {"ok": 0, "failed": 0, "skipped": 0}
        self.failed: set[str] = set()
        self.selected = 0

    def write(self, **line: Any) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.selected = max(self.selected, len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        self.selected = len(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name, phase = report.nodeid, report.when
        if phase == CRASHED and name in self.failed:
            return  # the worker was ended by `Watch`, after the test's own report
        line = self.open.setdefault(name, {"test": name, "status": "ok", "seconds": 0.0})
        line["seconds"] = round(line["seconds"] + getattr(report, "duration", 0.0), 3)
        if report.failed and line["status"] != "failed":
            text = "its worker ended while it ran: a crash, or longer than --timeout" if phase == CRASHED else None
            line |= {"status": "failed", "phase": phase, "note": (text or report.longreprtext)[-MOST:]}
        elif report.failed:
            line["note"] = f"{line['note']}\nand in {phase}: {report.longreprtext}"[-MOST:]
        elif report.skipped and line["status"] == "ok":
            line |= {"status": "skipped", "note": reason_of(report)}
        if phase in ("teardown", CRASHED):
            self.end(self.open.pop(name))

    def end(self, line: dict[str, Any]) -> None:
        self.counts[line["status"]] += 1
        if line["status"] == "failed":
            self.failed.add(line["test"])
        self.write(**line)

    def pytest_sessionfinish(self) -> None:
        left = self.selected - sum(self.counts.values())
        said = ", ".join(f"{number} {status}" for status, number in self.counts.items())
        status = "failed" if self.counts["failed"] else "ok"
        late = f", {left} left out for lack of time" if left else ""
        self.write(test="all", status=status, note=f"{self.selected} selected: {said}{late}")


def reason_of(report: pytest.TestReport) -> str:
    """Why a test was skipped, or failed as expected."""
    where = report.longrepr
    said = where[2] if isinstance(where, tuple) else getattr(report, "wasxfail", report.longreprtext)
    return said.removeprefix("Skipped: ")[:MOST]


def lines_in(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a file, without one that was cut off."""
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            yield json.loads(text)
        except ValueError:
            continue
