"""A few kernel tests with a line each, for dry runs: what a run of all tests on a GPU leaves in its folder.

python -m benchmarks.campaign.few_tests FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

TESTS = ("tests/kernels/test_counts.py",)


class Lines:
    """A pytest plugin: a flushed line of ``tests.jsonl`` for each test."""

    def __init__(self, folder: Path):
        self.path = folder / "tests.jsonl"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"test": report.nodeid, "status": report.outcome}) + "\n")


def main(folder: str) -> int:
    return int(pytest.main(["-q", "-p", "no:cacheprovider", *TESTS], plugins=[Lines(Path(folder))]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
