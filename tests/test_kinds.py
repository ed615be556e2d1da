"""The page of what was found in use names lists and tests that exist, each fault once."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent
PAGE = (FOLDER / "KINDS.md").read_text(encoding="utf-8")


def test_every_fault_is_found_from_one_page() -> None:
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| \d", line)]
    assert [int(row[0]) for row in rows] == list(range(23))
    for number, _, of, tests in rows:
        assert of == "`VARIANTS`" or (FOLDER / re.findall(r"\]\((.*)\)$", of)[0]).is_file(), number
        assert re.findall(r"`(\S+\.py)(?:::\w+)?`", tests), number


def test_the_tests_that_pages_name_exist() -> None:
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 25
    for file, test in named:
        source = (FOLDER / file).read_text(encoding="utf-8")
        assert f"def {test}(" in source if test else "def test_" in source or "VARIANTS" in source, (file, test)
    models = (FOLDER / "orthorank" / "KINDS.md").read_text(encoding="utf-8")
    sources = "".join(file.read_text(encoding="utf-8") for file in (FOLDER / "orthorank").rglob("test_*.py"))
    for test in re.findall(r"`(test_\w+)`", models):
        assert f"def {test}(" in sources, test
