"""The package's kernel on vLLM's cache, and the backend's own kernel with every query a request of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
WITHIN = {"float32": 2e-6, "float16": 3e-3}


def test_both_ways_agree_on_every_layout(llama: Path) -> None:
    """vLLM's Triton kernels write the cache and attend, interpreted."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.vllm.two_ways", str(llama)], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stderr[-4000:]
    cases = json.loads(process.stdout.splitlines()[-1])
    assert len(cases) == 15
    for case in cases:
        assert case["apart"] < WITHIN[case["dtype"]], case
        assert case["wrong"] < WITHIN[case["dtype"]], case
