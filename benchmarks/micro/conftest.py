"""Options of the microbenchmarks, their time limit, and the list of what was left out."""

import json
import time
from pathlib import Path

import pytest

BEGAN = time.monotonic()
LEFT_OUT: list[dict[str, str]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, default=420.0, help="no benchmark begins after so many seconds")
    parser.addoption("--left-out", type=Path, help="JSON file of what was left out and why")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "item" in metafunc.fixturenames:
        from benchmarks.micro.suite import benchmarks

        metafunc.parametrize("item", list(benchmarks()), ids=lambda item: item.name)


@pytest.fixture
def leave_out(request: pytest.FixtureRequest):
    """Skips a benchmark and remembers why."""

    def skip(name: str, why: str) -> None:
        LEFT_OUT.append({"benchmark": name, "why": why})
        pytest.skip(why)

    return skip


@pytest.fixture
def in_time(request: pytest.FixtureRequest) -> bool:
    return time.monotonic() - BEGAN < request.config.getoption("--seconds")


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--left-out")
    if path is not None:
        path.write_text(json.dumps(LEFT_OUT), encoding="utf-8")
