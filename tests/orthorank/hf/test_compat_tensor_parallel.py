"""A model sharded by transformers' own tensor-parallel plan over two processes, with a plan applied in each."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.orthorank.compat_tp import PLANS
from tests.orthorank.models import MODELS, tiny

ROOT = Path(__file__).parents[3]
# transformers ships no tensor-parallel plan for StableLM and GPT-OSS; its plan for Cohere breaks its own q/k norms.
WITHOUT_A_PLAN = {"stablelm", "stablelm-parallel", "cohere-norms", "gpt-oss"}


def run_in_two_processes(names: list[str], folder: Path) -> list[dict[str, Any]]:
    """What each of the two processes finds of the models called ``names``."""
    for name in names:
        tiny(name).save_pretrained(folder / name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [*command, "-m", "tests.orthorank.compat_tp", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def check(names: list[str], folder: Path) -> None:
    """Both processes compute what one does, and select the same bits."""
    for found in run_in_two_processes(names, folder):
        assert not (failed := {name: seen["failed"] for name, seen in found.items() if "failed" in seen}), failed
        assert sorted(found) == sorted(f"{name}, {plan}" for name in names for plan in PLANS)
        for name, seen in found.items():
            assert seen["sharded"], name
            assert seen["other weights"][0] == 0, name
            assert seen["error"] < 1e-5, f"{name}: {seen['error']}"
            assert seen["same positions"], name
            assert seen["same tokens"], name
            assert seen["selections"] == 3, name
            assert seen["bits"], f"{name}: processes select other tokens, or hold other states"


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    """Grouped heads with a bias; a projection for queries, keys and values; experts."""
    check(["llama-3", "phi-3", "qwen3-moe"], tmp_path)


@pytest.mark.slow
def test_every_family_with_a_tensor_parallel_plan(tmp_path: Path) -> None:
    check([name for name in MODELS if name not in WITHOUT_A_PLAN], tmp_path)
