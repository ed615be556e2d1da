"""The rehearsal: what it runs is there, and what fails in it is said."""

from dataclasses import replace

import pytest

from benchmarks import compile_report, rehearse


def test_every_part_runs_files_that_are_there(tmp_path):
    known = rehearse.parts(tmp_path)
    assert {part.name for part in known if part.quick} == {"imports", "A", "B", "defaults"}
    for part in known:
        for word in part.command:
            path = word.removeprefix("--ignore=")
            if path.startswith(("tests/", "benchmarks/")):
                assert (rehearse.ROOT / path).exists(), path


def test_a_part_that_fails_is_named(monkeypatch, capfd, tmp_path):
    known = [
        replace(part, command=("-c", "raise SystemExit(3)" if part.name == "A" else ""))
        for part in rehearse.parts(tmp_path)
    ]
    monkeypatch.setattr(rehearse, "parts", lambda folder: known)
    assert rehearse.main(["--quick"]) == 1
    said = [line.split()[0] for line in capfd.readouterr().out.splitlines() if " s  " in line]
    assert said == ["ok", "FAILED", "ok", "ok"]
    assert rehearse.main(["--part", "imports"]) == 0
    with pytest.raises(SystemExit):
        rehearse.main(["--part", "nothing"])
    assert "'nothing'" in capfd.readouterr().err


def test_what_does_not_compile_is_said(monkeypatch, capsys):
    cases = compile_report.CASES[:4]
    monkeypatch.setattr(compile_report, "CASES", cases)
    rows = {
        cases[0].name: {"case": cases[0].name, "shared": 1, "spills": 2},
        cases[1].name: {"case": cases[1].name, "error": "Traceback\nOutOfResources: registers"},
        cases[2].name: {"case": cases[2].name, "shared": 300 << 10},
    }
    monkeypatch.setattr(
        compile_report, "measurements", lambda target, group, names: (rows[n] for n in names if n in rows)
    )
    assert compile_report.main(["--slow"]) == 1
    said = capsys.readouterr().out
    assert f"fails: {cases[1].name}: OutOfResources: registers" in said
    assert f"fails: {cases[2].name}: {300 << 10} bytes" in said
    assert f"was not compiled: {cases[3].name}" in said
    assert "2 fail, 1 spill" in said
