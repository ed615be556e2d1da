"""The committed measurements: which are wanted, which are there, which are of other sources than today's."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from benchmarks.static import fingerprint
from benchmarks.static.case import REPORTED_TARGETS, TARGETS, Case
from benchmarks.static.cases import CASES
from benchmarks.static.peers import PEER_TARGETS, PEERS

Row = dict[str, Any]
Place = tuple[str, str, str]  # target, group, case


@dataclass(frozen=True)
class Wanted:
    """One measurement that the report holds."""

    case: Case
    target: str
    key: str

    @property
    def place(self) -> Place:
        return self.target, self.case.group, self.case.name


def wanted(triton_version: str, peers: bool = True) -> list[Wanted]:
    """All of them, in the order of the report."""
    chosen = [(case, TARGETS if case.slow else REPORTED_TARGETS) for case in CASES]
    chosen += [(case, PEER_TARGETS) for case in PEERS] if peers else []
    made = [
        Wanted(case, target, key)
        for case, targets in chosen
        for target, key in fingerprint.keys(case, targets, triton_version).items()
    ]
    return sorted(made, key=lambda w: REPORTED_TARGETS.index(w.target))


def place(row: Row) -> Place:
    return row["target"], row["group"], row["case"]


def is_current(row: Row | None, want: Wanted) -> TypeGuard[Row]:
    return row is not None and row["key"] == want.key


class Store:
    """Rows by place, in a JSON file with one row a line."""

    def __init__(self, path: Path):
        self.path = path
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        self.rows: dict[Place, Row] = {place(row): row for row in rows}

    def stale(self, wants: Iterable[Wanted]) -> list[Wanted]:
        """What is missing or was measured from other sources."""
        return [want for want in wants if not is_current(self.rows.get(want.place), want)]

    def write(self, wants: Iterable[Wanted], triton_version: str) -> None:
        """Rows that are still wanted, in order; a hash over their keys stands for sources and cases as a whole."""
        kept = [self.rows[want.place] for want in wants if want.place in self.rows]
        digest = fingerprint.digest(*(row["key"] for row in kept))
        head = json.dumps({"triton": triton_version, "sources_and_cases": digest})
        lines = ",\n".join(json.dumps(row) for row in kept)
        text = f'{head[:-1]}, "rows": [\n{lines}\n]}}\n'
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.path)
