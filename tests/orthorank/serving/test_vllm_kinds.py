"""`tests/vllm/KINDS.md` names tests that are there."""

import re
from pathlib import Path

TESTS = Path(__file__).parents[2]


def test_every_test_that_the_table_names_is_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (TESTS / "vllm" / "KINDS.md").read_text()))
    sources = "".join(file.read_text() for file in TESTS.rglob("test_*.py"))
    assert len(named) > 30
    assert [name for name in sorted(named) if f"def {name}(" not in sources] == []
