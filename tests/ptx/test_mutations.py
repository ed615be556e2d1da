"""Do the checks notice a broken kernel? Each barrier, wait, fence and bound of each kernel is dropped in turn."""

import json
import re
import subprocess
import sys

import pytest

from tests.ptx.test_kernels import ROOT, TARGETS, compiler_environment

ATTENTION = "sparse_query_attention_kernel"
# What may go unnoticed: kernel, kind, the line of the kernel's source (or the file), and why that is harmless.
HARMLESS = (
    ("scatter_rows_kernel", "bound", r"tl\.load\((rows|residual)_ptr", "a missing entry has a row; it is not stored"),
    ("apply_rotary_at_kernel", "bound", r"x\w* = tl\.load", "cos and sin of a missing entry are zeros"),
    (".*", "bound", r"tl\.store\((scores|counts|done)_ptr", "every thread would store the same scalar"),
    (".*_norm.*", "barrier", r"standard\.py", "keeps a sum from the row before it; a program has one row here"),
    ("rms_norm_select_kernel", "barrier", r"debug_barrier|atomic_add", "one thread stores all scores of a program and "
     "does the atomic, whose own barriers stand beside (AMD needs it: see the kernel)"),
    # Of attention, what is left over after `mutate` has taken away one after the other. Without all of it the kernel
    # still passes every check.
    (ATTENTION, "barrier", r"for n in range|_desc\.load|= attend\(|tl\.load\(ptrs\)|tl\.dot\(", "between steps of the "
     "one warp that initialises, arrives and copies; or at the end of a loop, where the next step has a barrier"),
    (ATTENTION, "fence", r"_desc\.load|tl\.dot\(", "nothing was stored to shared memory since the fence before it"),
    (ATTENTION, "wait for .*", r"for n in range|acc, total, peak = attend", "ends a loop, whose last step has waited"),
)  # fmt: skip
SHARE = 0.95
LISTED = 0.3  # at most so many of all may be excused by the list, or it would excuse blind checks


def is_harmless(result: dict) -> bool:
    """Listed, or one of two barriers, waits or fences that do the same: noticed when both are dropped."""
    if "redundant" in result:
        return True
    where = result["line"] or result["source"]
    return any(
        re.fullmatch(kernel, result["kernel"]) and re.fullmatch(kind, result["kind"]) and re.search(line, where)
        for kernel, kind, line, _ in HARMLESS
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_what_is_dropped_is_noticed(target):
    command = [sys.executable, "-m", "tests.ptx.mutate", target]
    child = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    results = list(map(json.loads, child.stdout.splitlines()))
    noticed = [r for r in results if "error" in r or "wrong" in r]
    missed = [r for r in results if "error" not in r and "wrong" not in r]
    unexplained = [r for r in missed if not is_harmless(r)]
    by_value = sum("wrong" in r for r in noticed)
    share = len(noticed) / (len(noticed) + len(unexplained))
    print(
        f"\n{target}: of {len(results)} broken kernels the checks notice {len(noticed) - by_value}, "
        f"the result {by_value}; {len(missed) - len(unexplained)} are harmless, {len(unexplained)} are not noticed: "
        f"{share:.1%} of those that matter are"
    )
    for r in unexplained:
        print(f"  {r['kernel']} {r['kind']} at {r['at']}, {r['source']}: {r['instruction']} | {r['line']}")
    assert len(results) > 150
    assert share >= SHARE
    assert sum("redundant" not in r for r in missed) <= LISTED * len(results)
    assert by_value < 0.1 * len(noticed), "a check should notice, not luck with the numbers"


def test_every_exception_has_a_reason():
    assert all(len(reason) > 20 for *_, reason in HARMLESS)
