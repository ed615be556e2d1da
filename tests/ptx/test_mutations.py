"""Do the checks notice a broken kernel? Each barrier, wait, fence and bound of each kernel is dropped in turn."""

import json
import subprocess
import sys

import pytest

from tests.ptx.harmless import HARMLESS, REASONS, unexplained
from tests.ptx.mutate import MUTATED, named
from tests.ptx.test_coverage import kernels_of
from tests.ptx.test_kernels import ROOT, TARGETS, compiler_environment

SHARE = 0.95
LISTED = 0.25  # at most so many of all may be excused by the list, or it would excuse blind checks


def is_noticed(result: dict) -> bool:
    return "error" in result or "wrong" in result


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_dropped_is_noticed(target):
    command = [sys.executable, "-m", "tests.ptx.mutate", target]
    child = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    results = list(map(json.loads, child.stdout.splitlines()))
    assert {r["kernel"] for r in results} == kernels_of(target), "every kernel is broken"
    noticed = [r for r in results if is_noticed(r)]
    redundant = [r for r in results if "redundant" in r]
    alone = [r for r in results if not is_noticed(r) and "redundant" not in r]
    left = unexplained(target, alone)
    by_value = sum("wrong" in r for r in noticed)
    share = len(noticed) / (len(noticed) + len(left))
    print(
        f"\n{target}: of {len(results)} broken kernels the checks notice {len(noticed) - by_value}, the result "
        f"{by_value}; {len(redundant)} are redundant, {len(alone) - len(left)} listed, {len(left)} not noticed: "
        f"{share:.1%} of those that matter are"
    )
    for r in left:
        print(f"  {r['case']}: {r['kind']} at {r['at']}, {r['source']}: {r['instruction']} | {r['line']}")
    assert share >= SHARE
    assert len(alone) <= LISTED * len(results)
    assert by_value < 0.1 * len(noticed), "a check should notice, not luck with the numbers"
    for one in HARMLESS:  # what excuses nothing has to go
        assert not one.count(target) or any(one.excuses(r) for r in alone), one


def test_every_exception_has_a_reason():
    for one in HARMLESS:
        assert len(REASONS[one.why]) > 20
        assert one.case in MUTATED
        assert len(one.line) > 10
    assert set(REASONS) == {one.why for one in HARMLESS}
    assert all(named(title) for first, more in MUTATED.items() for title in (first, *more))


def test_a_line_excuses_no_more_than_it_says():
    one = HARMLESS[0]
    result = {"case": one.case, "kind": one.kind, "line": one.line}
    count = one.count("sm_80")
    assert count > 0
    assert unexplained("sm_80", [result] * count) == []
    assert unexplained("sm_80", [result] * (count + 2)) == [result] * 2
    other = {**result, "kind": "fence"}
    assert unexplained("sm_80", [other]) == [other]
