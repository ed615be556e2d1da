"""The cases have everything that the launchers can choose: every kind of settings, both values of every option."""

import json
import subprocess
import sys

import pytest

from orthorank_kernels.ops.add_norm import NORMS
from tests.ptx.test_kernels import ROOT, TARGETS, compiler_environment

# Pointers that a kernel always has, by kernel; of all others a case has none, and a case has one.
ALWAYS = {
    "gather_rows_kernel": {"x_ptr", "positions_ptr", "out_ptr"},
    "scatter_rows_kernel": {"out_ptr", "positions_ptr", "rows_ptr"},
    "gather_add_rms_norm_kernel": {"hidden_ptr", "positions_ptr", "addend_ptr", "residual_ptr"},
    "add_low_rank_kernel": {"hidden_ptr", "low_ptr", "up_ptr", "out_ptr"},
    "silu_and_mul_kernel": {"gate_ptr", "up_ptr", "out_ptr"},
    "apply_rotary_at_kernel": {"x_ptr", "cos_ptr", "sin_ptr", "out_ptr"},
    "apply_rotary_and_cache_kernel": {
        f"{name}_ptr" for name in ("k_cache", "v_cache", "slots", "keys", "values", "cos", "sin")
    },
    "rms_norm_score_kernel": {"x_ptr", "scores_ptr"},
    "rms_norm_select_kernel": {"x_ptr", "scores_ptr", "positions_ptr", "counts_ptr", "done_ptr"},
    "select_tokens_kernel": {"scores_ptr", "positions_ptr", "counts_ptr"},
    "sparse_query_attention_kernel": {"q_ptr", "k_ptr", "v_ptr", "positions_ptr", "out_ptr"},
    "combine_kernel": {"sums_ptr", "peaks_ptr", "totals_ptr", "out_ptr"},
    "hopper_attention_kernel": {"q_ptr", "v_ptr", "positions_ptr", "out_ptr"},
}
ALONE = {"hopper_attention_kernel": "sm_90"}  # kernels that one target has
WORDS = {"NORM": set(NORMS), "FP8": {"", "e4m3", "e5m2"}}
DTYPES = {"bfloat16", "float16", "float32"}
# Kernel, parameter, value: what no case has, and why.
EXCEPT = {
    ("sparse_query_attention_kernel", "VENDOR", "amd"): "compiles to something else than PTX",
    ("sparse_query_attention_kernel", "TMA", "True", "sm_80"): "sm_80 has no tensor copies",
    **{("hopper_attention_kernel", n, "float32"): "it takes 16 bits alone" for n in ("q_ptr", "v_ptr", "out_ptr")},
}


def kernels_of(target: str) -> set[str]:
    return {kernel for kernel in ALWAYS if ALONE.get(kernel, target) == target}


def missing(target: str, found: dict) -> list[tuple[str, ...]]:
    """What a launcher can choose and no case has: (kernel, parameter, value)."""
    absent = []
    for kernel, by_parameter in found["choices"].items():
        for name, values in by_parameter.items():
            wanted: set[str] = set()
            if name.endswith("_ptr"):
                wanted |= set() if name in ALWAYS[kernel] else {"None"}
                halves = set(values) & DTYPES - {"float32"}
                wanted |= DTYPES if halves else set()
                if values == ["None"]:
                    wanted.add("a tensor")
                unexpected = name in ALWAYS[kernel] and "None" in values
                assert not unexpected, f"{kernel} has no {name} in some case: take it off the list"
            elif set(values) & {"True", "False"}:
                wanted |= {"True", "False"}
            else:
                wanted |= WORDS.get(name, set())
            absent += [(kernel, name, value) for value in sorted(wanted - set(values))]
    return [one for one in absent if one not in EXCEPT and (*one, target) not in EXCEPT]


@pytest.mark.parametrize("target", TARGETS)
def test_every_choice_of_a_launcher_occurs(target):
    command = [sys.executable, "-m", "tests.ptx.coverage", target]
    child = subprocess.run(command, cwd=ROOT, env=compiler_environment(), capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    found = json.loads(child.stdout)
    assert found["kinds"] == found["all kinds"]
    assert set(found["choices"]) == kernels_of(target)
    assert missing(target, found) == []
    # Of what is told apart by comparing numbers: pages of one block of keys or more, rows that are aligned or not.
    attention = found["choices"]["sparse_query_attention_kernel"]
    pages, blocks = (set(map(int, attention[name])) - {0} for name in ("PAGE_SIZE", "BLOCK_N"))
    assert any(page % block == 0 for page in pages for block in blocks if block > 16)
    assert any(page % block for page in pages for block in blocks)
    assert {"1", "4", "8", "16"} <= set(attention["VECTOR"])


def test_what_is_missing_is_seen():
    pointers = {"x_ptr": ["float16", "float32"], "weight_ptr": ["None"], "starts_ptr": ["int32"]}
    found = {"choices": {"rms_norm_score_kernel": {**pointers, "COSINE": ["True"], "NORM": ["layer", "rms"]}}}
    kernel = "rms_norm_score_kernel"
    assert missing("sm_90", found) == [
        (kernel, "x_ptr", "bfloat16"), (kernel, "weight_ptr", "a tensor"), (kernel, "starts_ptr", "None"),
        (kernel, "COSINE", "False"), (kernel, "NORM", "identity"),
    ]  # fmt: skip
    assert all(len(reason) > 20 for reason in EXCEPT.values())
