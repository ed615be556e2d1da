"""The README is true: its figures are those of the committed results, its code runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_committed_results() -> None:
    run = subprocess.run(
        [sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_kernels_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    example = next(block for block in blocks if "from orthorank_kernels import" in block)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["out"].shape == (1, 4, 85, 16)  # type: ignore[attr-defined]


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_test_command_is_the_one_ci_calls() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "\nmake test" in (ROOT / "README.md").read_text()
