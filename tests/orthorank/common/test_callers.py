"""A warning names the line of the caller, not one of this package or of a library between."""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import pad

from orthorank import OrthoRankConfig, apply
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
PADDED = pad(ids_of(1, 10), (0, 6))
STRANGE = {"layers": [1], "aura": 1, "version": "99.0"}


def line_of(call: Callable[[], Any]) -> set[tuple[str, int]]:
    """Where the warnings of ``call``, which is one line, say that they come from."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call()
    assert said, "nothing was said, and this tests nothing"
    return {(one.filename, one.lineno) for one in said}


@torch.no_grad()
@pytest.mark.parametrize("part", ["the model", "its decoder"])
def test_a_batch_that_looks_padded(part: str) -> None:
    model = tiny("llama-3")
    called = model if part == "the model" else model.model
    with apply(model, PLAN):
        found, line = line_of(lambda: called(PADDED)), sys._getframe().f_lineno
    assert found == {(__file__, line)}


@torch.no_grad()
def test_a_batch_behind_a_library() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama-3")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).eval()
    with apply(model, PLAN):
        found, line = line_of(lambda: wrapped(input_ids=PADDED)), sys._getframe().f_lineno
    assert (__file__, line) in found


def test_a_plan_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "orthorank.json").write_text(json.dumps(STRANGE))
    found, line = line_of(lambda: OrthoRankConfig.from_dict(STRANGE)), sys._getframe().f_lineno
    assert found == {(__file__, line)}
    found, line = line_of(lambda: OrthoRankConfig.from_pretrained(tmp_path)), sys._getframe().f_lineno
    assert found == {(__file__, line)}
    found, line = line_of(lambda: OrthoRankConfig.from_dict({"layers": []})), sys._getframe().f_lineno
    assert found == {(__file__, line)}
