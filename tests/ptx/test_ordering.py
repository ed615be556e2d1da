"""The order of what several programs do in global memory (PTX ISA 9.0, 8: memory consistency model).

`rms_norm_select` lets the program that finishes last select from scores that the others wrote. That is right only
because each releases its scores and the last one acquires them all; on a GPU, leaving that out mostly works.
"""

import json
import subprocess
import sys

import pytest

from tests.ptx.test_kernels import ROOT, TARGETS, USUAL, compiler_environment


@pytest.mark.parametrize(
    "target", [pytest.param(each, marks=() if each == USUAL else pytest.mark.slow) for each in TARGETS]
)
def test_the_selection_in_the_same_launch_needs_its_release_and_its_acquire(target):
    """The real kernel, with its one atomic weakened."""
    command = [sys.executable, "-m", "tests.ptx.mutate", target, "--ordering"]
    child = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    results = list(map(json.loads, child.stdout.splitlines()))
    assert [r["order"] for r in results] == ["acq_rel.gpu", "release.gpu", "acquire.gpu", "relaxed.gpu", "acq_rel.cta"]
    assert "error" not in results[0], results[0]
    for result in results[1:]:
        assert "nothing orders the two" in result["error"], result
        assert "scores" in result["error"], result
