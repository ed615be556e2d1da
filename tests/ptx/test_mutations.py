"""Do the checks notice a broken kernel? Each barrier, wait, fence and bound of each kernel is dropped in turn."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.ptx.case import HALF, HALF16
from tests.ptx.harmless import HARMLESS, REASONS, unexplained
from tests.ptx.mutate import MUTATED, Kept, digest, named
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


def test_what_a_run_gave_is_kept_for_this_kernel_and_these_arguments_alone(tmp_path):
    file = tmp_path / "done.jsonl"
    first = Kept(file, "gather", "a")
    first["12"] = ("error", "Race: reads byte 4")
    first["12 40"] = ("", "")
    with file.open("a") as half:  # of a process that was ended as it wrote
        half.write('{"kernel": "gather", "of": "a", "dropp')
    assert Kept(file, "gather", "a") == {"12": ("error", "Race: reads byte 4"), "12 40": ("", "")}
    assert Kept(file, "gather", "b") == {}
    Kept(file, "gather", "a")["7"] = ("wrong", "")  # stands behind the half line, and is run once more
    Kept(file, "gather", "a")["8"] = ("wrong", "")
    assert set(Kept(file, "gather", "a")) == {"12", "12 40", "8"}


def test_what_an_outcome_follows_from():
    case = named("gather_rows, hidden 200, bfloat16")
    found = digest("sm_90", ["ptx"], [case])
    assert digest("sm_90", ["ptx"], [case]) == found

    def moved(dtype):
        made = case.arguments(dtype)
        made["x"][0, 0, 0] += 1
        return made

    assert case.dtype == HALF
    changes = ({"dtype": HALF16}, {"settings": {"gather_rows": {"rows": 2}}}, {"arguments": moved})
    others = [digest("sm_90", ["ptx"], [replace(case, **each)]) for each in changes]
    others += [digest("sm_80", ["ptx"], [case]), digest("sm_90", ["ptx "], [case]), digest("sm_90", ["ptx"], [])]
    assert len({found, *others}) == 1 + len(others)


def test_what_is_left_is_told(capsys, monkeypatch):
    kept = Kept(None, "gather", "a")
    kept.tell(0, 8)
    monkeypatch.setattr("time.monotonic", lambda: kept.began + 6)
    kept["1"] = kept["2"] = ("", "")
    kept.tell(2, 8)
    assert capsys.readouterr().err == "gather: 0 of 8\ngather: 2 of 8, about 18 s left\n"
