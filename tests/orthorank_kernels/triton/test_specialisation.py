"""One compilation for a model, not one for a prompt: prompt length, batch size and k never make Triton compile anew.

A compilation in the middle of serving stops everything for seconds. What counts is the key of Triton's cache: the
constexprs, what is specialised on (an int that is 1, that 16 divides, that needs 64 bits), and the launch options.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.orthorank_kernels.specialisation_worker import EXTREME, ORDINARY

pytest.importorskip("triton.knobs", reason="an older Triton has no key to note")

ROOT = Path(__file__).resolve().parents[3]
# Variants of a kernel over all lengths to a million, where there is more than one: the sizes of a selection that stays
# in registers, and its stream; tiles of attention for few rows, each with and without splits; 64-bit strides of a batch
# row; on AMD, tensors of more than 2 GB.
VARIANTS = {"select_tokens_kernel": 3, "rms_norm_select_kernel": 3, "sparse_query_attention_kernel": 5}
MOST_VARIANTS = 2


@pytest.fixture(scope="module", params=[pytest.param("sm_80", marks=pytest.mark.slow), "sm_90", "gfx942"])
def noted(request: pytest.FixtureRequest) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.orthorank_kernels.specialisation_worker", request.param]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


def variants(noted: list[dict], sizes: dict) -> dict[tuple[str, str], dict[str, list[str]]]:
    """By call and kernel: the sizes that share each key."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for one in noted:
        for kernel, key in one["keys"] if one["sizes"] in sizes else ():
            found.setdefault((one["call"], kernel), {}).setdefault(key, []).append(one["sizes"])
    return found


def test_every_call_launches(noted):
    assert {one["sizes"] for one in noted} == ORDINARY.keys() | EXTREME.keys()
    assert all(one["keys"] for one in noted), [one["call"] for one in noted if not one["keys"]]


def test_prompts_batches_and_k_share_one_compilation(noted):
    split = {at: list(keys.values()) for at, keys in variants(noted, ORDINARY).items() if len(keys) > 1}
    assert not split, "\n".join(f"{at}: {sizes}" for at, sizes in split.items())


def test_nothing_up_to_a_million_tokens_makes_more_than_a_few(noted):
    for (call, kernel), keys in variants(noted, {**ORDINARY, **EXTREME}).items():
        assert len(keys) <= VARIANTS.get(kernel, MOST_VARIANTS), f"{call}: {list(keys.values())}"
