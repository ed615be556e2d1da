"""transformers' own tests of four families, on models of which every token takes the path of the selected ones.

    make test-slow TRANSFORMERS_TESTS=DIR     # a checkout of transformers at the tag of the version that is installed

What a patched model refuses is listed below, with the words of the refusal. What else fails must fail without a
plan too (for want of a network, say), or it is a fault.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = "every_token_selected"
SUITES = {
    "llama": "LlamaModelTest",
    "mistral": "MistralModelTest",
    "qwen2": "Qwen2ModelTest",
    "gemma3": "Gemma3TextModelTest",
}
NEEDED = ("parameterized", "httpx")  # by transformers' tests, beside what this package's need

# What is refused: the words of the refusal, and the tests that ask for it.
ATTENTIONS = "OrthoRankError: output_attentions is True; a layer that selects tokens has no attention weights"
HOLES = "OrthoRankError: attention_mask has holes in row"
REFUSED = {
    ATTENTIONS: (
        "test_assisted_decoding_matches_greedy_search_0_random",
        "test_assisted_decoding_matches_greedy_search_1_same",
        "test_assisted_decoding_sample",
        "test_attention_outputs",
        "test_beam_sample_generate_dict_output",
        "test_beam_search_generate_dict_output",
        "test_beam_search_generate_dict_outputs_use_cache",
        "test_capture_outputs_decorator",
        "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions",
        "test_generate_compilation_all_outputs",
        "test_greedy_generate_dict_outputs",
        "test_greedy_generate_dict_outputs_use_cache",
        "test_model_outputs_equivalence",
        "test_retain_grad_hidden_states_attentions",
        "test_sample_generate_dict_output",
        "test_sliding_window_mask",
    ),
    "OrthoRankError: position_ids restart or jump inside a row: packed sequences": (
        "test_eager_padding_matches_padding_free_with_position_ids",
        "test_sdpa_padding_matches_padding_free_with_position_ids",
    ),
    HOLES: ("test_custom_4d_attention_mask",),
}
# Their masks leave out one id wherever it stands among random ids: most have holes, and some have none.
SOMETIMES = {
    HOLES: (
        "test_question_answering_model",
        "test_sequence_classification_model",
        "test_sequence_classification_model_for_multi_label",
        "test_sequence_classification_model_for_single_label",
        "test_token_classification_model",
    )
}
WORDS = {test: words for listed in (REFUSED, SOMETIMES) for words, tests in listed.items() for test in tests}
ALWAYS = {test for tests in REFUSED.values() for test in tests}
SECONDS = {"of a test": 600, "of a suite": 7200}


@pytest.fixture(scope="module")
def checkout() -> Path:
    given = os.environ.get("TRANSFORMERS_TESTS")
    if not given:
        pytest.skip("TRANSFORMERS_TESTS names no checkout of transformers: make test-slow TRANSFORMERS_TESTS=DIR")
    for name in NEEDED:
        pytest.importorskip(name, reason=f"transformers' tests need it: pip install {name}")
    folder = Path(given).resolve()
    source = folder / "setup.py"
    found = re.search(r'version="([^"]+)"', source.read_text(encoding="utf-8")) if source.is_file() else None
    installed = importlib.metadata.version("transformers")
    if found is None or found[1] != installed:
        of = f"of {found[1]}" if found else "none of transformers"
        pytest.fail(f"TRANSFORMERS_TESTS is {given}, {of}; it must be a checkout of v{installed}, which is installed")
    return folder


def run(checkout: Path, tests: Sequence[str], report: Path, *, plan: bool) -> dict[str, list[dict[str, Any]]]:
    """Rows of the report, by test."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "EVERY_TOKEN_REPORT": str(report),
        "EVERY_TOKEN_PLAN": "on" if plan else "off",
        "EVERY_TOKEN_SECONDS": str(SECONDS["of a test"]),
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider", *tests]
    most = SECONDS["of a suite"]
    done = subprocess.run(
        command, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=most
    )
    assert report.is_file(), done.stdout[-3000:] + done.stderr[-3000:]
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in report.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows[row["test"].split("::")[-1]].append(row)
    return rows


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [str(row["error"]) for row in rows if row["outcome"] == "failed"]


@pytest.mark.slow
@pytest.mark.parametrize("family", SUITES)
def test_transformers_own_tests(family: str, checkout: Path, tmp_path: Path) -> None:
    suite = f"tests/models/{family}/test_modeling_{family}.py::{SUITES[family]}"
    rows = run(checkout, [suite], tmp_path / "patched.jsonl", plan=True)
    every = [row for of_test in rows.values() for row in of_test]
    updated, seen = (sum(row[name] for row in every) for name in ("updated", "seen"))
    assert updated == seen > 1000, f"{updated} of {seen} tokens were updated: not every one took the selected path"
    assert sum(row["outcome"] == "passed" for row in every) > 100

    wrong = {}
    for test, of_test in rows.items():
        words = WORDS.get(test)
        if others := [error for error in failures(of_test) if words is None or words not in error]:
            wrong[test] = others
        ran = any(row["outcome"] != "skipped" for row in of_test)
        assert test not in ALWAYS or not ran or failures(of_test), f"{test} is no longer refused: take it off the list"
    if wrong:
        plain = run(checkout, [f"{suite}::{test}" for test in wrong], tmp_path / "plain.jsonl", plan=False)
        wrong = {test: errors for test, errors in wrong.items() if not failures(plain.get(test, []))}
    assert not wrong, json.dumps(wrong, indent=1)[:5000]


def test_the_list_names_each_test_once() -> None:
    assert [len(tests) for tests in REFUSED.values()] == [16, 2, 1]
    assert [len(tests) for tests in SOMETIMES.values()] == [5]
    assert len(WORDS) == 24
    assert len(ALWAYS) == 19
    assert (Path(__file__).parent / f"{PLUGIN}.py").is_file()
