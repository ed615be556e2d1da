"""The table of faults and their kinds names tests that exist, and three variants at least of each."""

import re
from pathlib import Path

FOLDER = Path(__file__).parent


def test_every_kind_has_its_test_and_three_variants() -> None:
    rows = [
        line.strip("| ").split(" | ")
        for line in (FOLDER / "edges.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| ") and "`test_" in line
    ]
    assert len(rows) >= 14
    for kind, _, variants, tests in rows:
        assert len(variants.split(";")) >= 3, kind
        for name in re.findall(r"`(test_\w+\.py)`", tests):
            assert "\ndef test_" in next(FOLDER.rglob(name)).read_text(encoding="utf-8"), name
