"""Keys and values of a selected layer go to vLLM's cache in one launch, where vLLM's own path has two."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm
ROOT = Path(__file__).parents[2]
ROUNDING = {"float32": 1e-6, "float16": 4e-3}  # vLLM's rotation rounds its products, too
LOOKED_AT = {"lt", "ge", "bitwise_or", "masked_fill", "max", "_local_scalar_dense"}  # values, on a CPU alone
VLLM = ["addmm", "_C::rotary_embedding", "reshape_and_cache_kernel_flash"]


def test_one_launch_instead_of_two(llama: Path) -> None:
    """On vLLM's layers, of every layout and kind of rotary embedding, with its kernels interpreted."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.vllm.two_writes", str(llama)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    cases = json.loads(process.stdout.splitlines()[-1])
    assert len(cases) == 12
    for case in cases:
        before, after = ([name for name in names if name not in LOOKED_AT] for names in case["launched"])
        assert before == VLLM, case
        if case["kind"] == "another forward":
            assert (after, case["apart"]) == (VLLM, 0), case
            continue
        assert after == ["addmm", "orthorank_kernels::apply_rotary_and_cache_"], case
        assert case["as apply_rotary_at"], case
        assert case["apart"] < ROUNDING[case["dtype"]], case


CHANGES: dict[str, dict[str, Any]] = {
    "another dtype of the cache": {"kv_cache": torch.zeros(2, 1, 4, 8, dtype=torch.uint8)},
    "keys of another layer": {"kv_sharing_target_layer_name": "layers.0"},
    "an encoder": {"attn_type": "encoder"},
    "another write": {"own": True},
}


@pytest.mark.parametrize("change", [None, *CHANGES])
@pytest.mark.parametrize("backend", ["flash_attn", "triton_attn"])  # FlashInfer's needs its package
def test_where_the_backend_does_nothing_but_write(backend: str, change: str | None) -> None:
    import importlib

    from orthorank.serving.vllm.attention import writes_plainly

    name = {"flash_attn": "FlashAttentionImpl", "triton_attn": "TritonAttentionImpl"}
    module = importlib.import_module(f"vllm.v1.attention.backends.{backend}")
    kind: Any = getattr(module, name[backend])
    changes = {} if change is None else CHANGES[change]
    if "own" in changes:
        kind = type("Own", (kind,), {"do_kv_cache_update": lambda self, *args: None})
    impl = object.__new__(kind)
    impl.attn_type = changes.get("attn_type", "decoder")
    attention = SimpleNamespace(impl=impl, kv_cache=torch.zeros(2, 1, 4, 8), kv_sharing_target_layer_name=None)
    vars(attention).update({n: v for n, v in changes.items() if hasattr(attention, n)})
    assert writes_plainly(attention, torch.float32) is (change is None)
