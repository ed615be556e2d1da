"""The committed reports are complete, of today's sources, and within the limits."""

import json

import pytest

pytest.importorskip("triton")

from benchmarks.static.case import TARGETS, broken_limits
from benchmarks.static.run import ROOT
from benchmarks.static.store import Store, is_current, wanted

REPORT = ROOT / "benchmarks" / "results" / "static.json"
COMMAND = "python benchmarks/static_report.py"


def committed_version() -> str:
    return json.loads(REPORT.read_text(encoding="utf-8"))["triton"]


def test_the_committed_report_is_complete_and_of_todays_sources():
    version = committed_version()
    wants = [w for w in wanted(version, peers=False) if w.target in TARGETS]
    stale = Store(REPORT).stale(wants)
    names = [f"{w.target} {w.case.name}" for w in stale[:5]]
    assert not stale, f"{len(stale)} of {len(wants)} measurements are old or missing ({names} ...); run: {COMMAND}"


def test_the_committed_report_keeps_the_limits():
    store, broken = Store(REPORT), []
    for want in wanted(committed_version(), peers=False):
        row = store.rows.get(want.place)
        if want.target in TARGETS and is_current(row, want):  # the test above names the others
            limits = want.case.limits_for(want.target)
            found = [row["error"]] if "error" in row else broken_limits(row, limits, want.target)
            broken += [f"{want.target} {want.case.name}: {what}" for what in found]
    assert not broken, "\n".join(broken)
