"""`python -m tests.ptx` shows a person what happened."""

import re
import shlex
import subprocess
import sys

import pytest

from ptx_check.scheduler import ranges
from tests.ptx.test_kernels import ROOT, compiler_environment

KERNEL = "gather_rows, hidden 200, bfloat16"


def show(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "tests.ptx", *arguments]
    return subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)


def test_every_instruction_with_who_runs_it_and_its_line():
    done = show(KERNEL, "--arch", "80", "--seed", "3", "--trace", "--program", "1")
    assert done.returncode == 0, done.stderr
    assert "as the reference" in done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) > 30
    assert all(line.split()[0] == "1" and "(rows.py:" in line for line in lines[:-1])
    assert any("warps 0 " in line and "`mov.u32 %r" in line for line in lines)
    # 200 numbers are 25 times eight: the other threads' predicate keeps them from storing.
    assert any("threads 0-24 " in line and " st.global.v4.b32 [" in line for line in lines)


def test_both_accesses_of_a_race_with_their_lines():
    """The command that docs/ptx.md gives for it."""
    page = (ROOT / "docs" / "ptx.md").read_text(encoding="utf-8")
    command = re.search(r"^python -m tests\.ptx (.*--drop \S+) ", page, re.MULTILINE)
    assert command is not None
    done = show(*shlex.split(command[1]))
    assert done.returncode == 1
    race, where = done.stderr.splitlines()[1:3]
    assert race.startswith("Race: reads byte ")
    assert "has written by `st.shared.b32 [%r" in race
    assert race.count(".py:") == 1
    assert "`ld.shared.b32 %r" in where
    assert ".py:" in where
    assert "standard.py" not in done.stderr  # the kernel's line, not that of Triton's library


def test_what_is_not_there():
    done = show("no such kernel")
    assert done.returncode == 2
    assert KERNEL in done.stdout


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([5], "5"), ([0, 1, 2, 3, 7, 9, 10], "0-3,7,9-10")])
def test_runs_of_numbers(numbers, text):
    assert ranges(numbers) == text
