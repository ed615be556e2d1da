"""Keys and values of a selected layer are rotated and written to the cache where the product left them."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.vllm
HEADS, KV_HEADS, HEAD_DIM, HIDDEN = 4, 2, 8, 16
SIZES = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM)


def doubled(positions: torch.Tensor, x: torch.Tensor, other: None) -> tuple[torch.Tensor, None]:
    """In place of vLLM's rotary embedding, which works in place."""
    return x.mul_(2), other


@pytest.mark.parametrize("plain", [True, False])
def test_neither_is_copied(plain: bool) -> None:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    from orthorank.serving.vllm.projections import Projections

    torch.manual_seed(0)
    made: list[torch.Tensor] = []

    class Merged(torch.nn.Linear):
        quant_method: Any = object.__new__(UnquantizedLinearMethod) if plain else None

        def forward(self, x: torch.Tensor) -> Any:
            made.append(super().forward(x))
            return made[-1], None

    attention = SimpleNamespace(
        qkv_proj=Merged(HIDDEN, sum(SIZES)), q_size=SIZES[0], kv_size=SIZES[1], head_dim=HEAD_DIM, num_heads=HEADS,
        num_kv_heads=KV_HEADS, rotary_emb=doubled,
    )  # fmt: skip
    x, positions, rows = torch.randn(6, HIDDEN), torch.arange(6), torch.tensor([1, 4], dtype=torch.int32)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, attention.qkv_proj.weight, attention.qkv_proj.bias)
        projections = Projections(attention)
        keys, values = projections.keys_and_values(x, positions)
        queries = projections.queries(x[rows], positions[rows], rows)
    q, k, v = wanted.split(SIZES, dim=-1)
    assert len(made) == (not plain), "else only the rows that are needed are computed"
    assert keys.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert keys.shape == values.shape == (6, KV_HEADS, HEAD_DIM)
    torch.testing.assert_close(keys.flatten(1), 2 * k)
    torch.testing.assert_close(values.flatten(1), v)
    torch.testing.assert_close(queries.flatten(1), 2 * q[rows])
