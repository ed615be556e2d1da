"""Both campaigns dry, from beginning to end: on a CPU, tiny, the same parent and the same steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.campaign import kernels, lines, plan
from benchmarks.campaign.parent import ROOT

pytest.importorskip("transformers")
pytest.importorskip("triton")
# What only a GPU has; everything else has to run.
NEEDS_A_GPU = ("needs a GPU", "measures on a GPU")


def dry(name: str, output: Path, machine: Path) -> list[dict]:
    command = [sys.executable, "benchmarks/gpu_campaign.py", name, "--dry-run", "--output", str(output),
               "--machine", str(machine)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    found = lines.read(output / "results.jsonl")
    troubles = [line for line in found if line.get("status") in ("failed", "wrong", "switched off", "stopped")]
    assert not troubles, run.stdout
    assert run.returncode == 0, run.stdout + run.stderr
    assert (output / "table.md").read_text() in run.stdout, "the table is printed"
    assert len(list(output.iterdir())) <= 8
    left = [line["note"] for line in found if line.get("status") == "left out"]
    assert all(any(word in note for word in NEEDS_A_GPU) for note in left), left
    return found


@pytest.mark.slow  # two minutes; `make rehearse-gpu` runs them as well
def test_both_campaigns(tmp_path):
    a = dry("A", tmp_path / "A", tmp_path / "machine")
    for step in plan.A:
        own = [line for line in a if line["step"] == step.name]
        ended = {line["child"] for line in own if line.get("kind") == "end" and line["status"] == "ok"}
        assert ended == {child.name for child in step.children}
        assert len(own) > len(step.children), f"{step.name} has no result"
    assert {line["what"] for line in a if line.get("kind") == "ceiling"} == {"copy", "product"}
    checked = {line["what"] for line in a if line["step"] == "smoke" and line.get("kind") == "check"}
    assert {kernel.name for kernel in kernels.KERNELS} < checked
    ours = [line for line in a if line.get("kind") == "time" and line["provider"].startswith("orthorank_kernels")]
    assert {line["step"] for line in ours} == {"attention", "rows", "layer"}
    assert all(line["share"] is not None for line in ours)
    variants = {line["variant"] for line in a if line.get("kind") == "forward"}
    assert variants == {"dense", *(f"{kind} {n} %" for kind in ("layer pruning", "orthorank") for n in (10, 20))}
    b = dry("B", tmp_path / "B", tmp_path / "machine")
    # Two processes may write to the file and to its copy in another order.
    assert sorted(map(json.dumps, b[: len(a)])) == sorted(map(json.dumps, a))
    assert {line["step"] for line in b[len(a) :]} == {step.name for step in plan.B}
    assert "A dry run on a CPU" in (tmp_path / "B" / "table.md").read_text()
