"""After `warmup` a model's calls find their kernels compiled, for prompts of any length."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import orthorank_kernels as ok
from orthorank_kernels.dispatch import BackendError, interpreting
from tests.orthorank_kernels.every_op import NOT_OPS
from tests.orthorank_kernels.tools import DEVICE

pytest.importorskip("triton.knobs", reason="an older Triton has no key to note")

ROOT = Path(__file__).resolve().parents[2]
MODEL: dict[str, Any] = {"dtype": torch.float32, "hidden": 16, "heads": 4, "kv_heads": 2, "head_dim": 8}


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_nothing_is_left_to_compile(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.orthorank_kernels.warmup_worker", target]
    child = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr[-4000:]
    rows = [json.loads(line) for line in child.stdout.splitlines()]
    assert {row["layout"] for row in rows} == {"batch", "packed", "paged"}
    # Strides beyond 32 bits are another kernel, and AMD's compiler reads tensors beyond 2 GB otherwise. Two tokens in
    # pages give a block table of one column, whose stride of 1 is another kernel, too.
    rare = {"batch": {"a million", "32k"}, "packed": {"a million", "32k"}, "paged": {"a million", "32k", "two tokens"}}
    cold = [row for row in rows if not row["warm"] and row["sizes"] not in rare[row["layout"]]]
    assert not cold, "\n".join(map(str, cold))
    assert any(row["warm"] for row in rows)


@pytest.mark.skipif(not interpreting(), reason="the interpreter's launches are counted")
@pytest.mark.parametrize("layout", ["batch", "packed", "paged"])
def test_every_op_of_a_layout_is_launched(layout: str) -> None:
    seconds = ok.warmup(**MODEL, intermediate=24, rank=3, layout=layout, tokens=(5,), device=DEVICE)
    assert all(time > 0 for time in seconds.values())
    attention = {"batch": "", "packed": "_varlen", "paged": "_paged"}[layout]
    ops = {name for name in set(ok.__all__) - NOT_OPS if not name.startswith("sparse_query_attention")}
    ops -= {"apply_rotary_and_cache_"} if layout != "paged" else set()
    assert set(seconds) == ops | {f"sparse_query_attention{attention}"}


@pytest.mark.skipif(not interpreting(), reason="the interpreter's launches are counted")
def test_some_ops_with_the_models_options() -> None:
    options: dict[str, Any] = {"select_tokens": {"threshold": 0.5}, "rms_norm_score": {"score": "cosine"}}
    seconds = ok.warmup(**MODEL, ops=("select_tokens", "rms_norm_score"), options=options, tokens=(5,), device=DEVICE)
    assert set(seconds) == set(options)


def test_on_a_cpu_there_is_nothing_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert ok.warmup(**MODEL, device="cpu") == {}
    with pytest.raises(BackendError, match="warmup on device mps: no Triton kernels are tested"):
        ok.warmup(**MODEL, device="mps")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layout": "ragged"}, "layout is 'ragged'; it may be one of 'batch', 'packed', 'paged'"),
        ({"ops": ("sparse_query_attention_paged",)}, "'sparse_query_attention_paged' is not among those of layout"),
        ({"options": {"gather": {}}}, "op 'gather' is not among those of layout 'batch'"),
        ({"hidden": 0}, "hidden is 0; it must be an int of at least 1"),
        ({"rank": 0}, "rank is 0; it must be an int of at least 1, or None for no maps"),
        ({"tokens": (0,)}, "tokens is 0; it must be an int of at least 1"),
        ({"tokens": 64}, r"tokens is 64; it must be a sequence: pass \(64,\)"),
        ({"ops": "gather_rows"}, r"ops is 'gather_rows'; it must be a sequence: pass \('gather_rows',\)"),
        ({"dtype": "float16"}, "dtype is 'float16'; it may be one of torch.float32, torch.float16, torch.bfloat16"),
        ({"kv_heads": 3}, "kv_heads is 3 and heads 4; kv_heads must divide heads"),
        ({"options": {"gather_rows": {"at": 1}}}, r"options\['gather_rows'\] has 'at'; gather_rows takes x, positions"),
    ],
)
@pytest.mark.parametrize("device", sorted({"cpu", DEVICE}))
def test_wrong_arguments(changes: dict, sentence: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is compiled, as on the machine where a server is written."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises((TypeError, ValueError), match=sentence):
        ok.warmup(**{**MODEL, "device": device, **changes})
