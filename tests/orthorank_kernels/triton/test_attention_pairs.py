"""The kernel computes the query-key pairs that the model of `benchmarks/static/pairs.py` counts, no more."""

from typing import Any

import pytest
import torch

from benchmarks.static.pairs import count_pairs
from orthorank_kernels.dispatch import interpreting
from orthorank_kernels.triton import attention, configs

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dim", [64, 128])
def test_little_is_computed_in_vain(dim: int, target: str) -> None:
    """With a third of the tokens selected, evenly, and groups of four heads."""
    for keys, bound in ((2048, 1.15), (32768, 1.01)):
        constexprs, *_ = configs.launch_settings(dim, 4, torch.bfloat16, target, keys // 3)
        tile = {name.lower(): constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "PACK")}
        pairs = count_pairs(range(1, keys, 3), group=4, **tile)
        assert pairs.ratio <= bound, f"{keys} keys: {pairs.ratio:.3f}"


@pytest.mark.skipif(not interpreting(), reason="counts in Triton's interpreter")
@pytest.mark.parametrize(("selected", "group"), [(37, 4), (64, 1), (41, 3)])
def test_the_kernel_computes_what_the_model_says(selected: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter

    builder, computed = interpreter.interpreter_builder, 0
    dot = builder.create_dot

    def counted(a: Any, b: Any, *rest: Any) -> Any:
        nonlocal computed
        computed += a.data.shape[0] * b.data.shape[1] if b.data.shape[0] == 16 else 0  # q k^T, of head_dim 16
        return dot(a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", counted)
    monkeypatch.setattr(configs, "splits", lambda *_: 1)
    positions = torch.randperm(150, generator=torch.Generator().manual_seed(selected))[:selected].sort().values
    q, k = torch.zeros(1, group, selected, 16), torch.zeros(1, 1, 150, 16)
    attention.sparse_query_attention(q, k, k, positions.int()[None], 1.0, None, None, 0, None, None, False)
    constexprs, *_ = configs.launch_settings(16, group, torch.float32, "interpreter", selected)
    tile = {name.lower(): constexprs[name] for name in ("BLOCK_M", "BLOCK_N", "PACK")}
    assert tile["block_n"] != 16, "or the second product would be counted too"
    assert computed == count_pairs(positions.tolist(), group=group, **tile).executed
