"""Keys and values of all tokens and queries of the chosen ones, from the one weight that vLLM keeps for all three."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear


class Projections:
    """The projections of one attention layer.

    vLLM merges the three weights, row by row: queries, keys, values. Where the merged weight is an ordinary matrix its
    rows are used apart, so queries are computed of the chosen tokens alone. Where it is quantised, or packed for a CPU,
    the product is computed as a whole and what is not needed is dropped: 7 to 8 % of a Llama layer's products.

    Args:
        attention: vLLM's ``self_attn`` of Llama, Mistral, Qwen2 or Qwen3, with its weights.
    """

    def __init__(self, attention: Any) -> None:
        self.attention = attention
        self._split = _is_plain(attention.qkv_proj, attention.q_size + 2 * attention.kv_size)
        self._merged: Tensor | None = None

    def keys_and_values(self, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, ``[tokens, kv_heads, head_dim]``: parts of one product's rows, as in vLLM's layers.

        vLLM rotates in place and its backends write to the cache from strided rows, so neither is copied.

        Args:
            normed: ``[tokens, hidden]``; positions: int64 ``[tokens]``.
        """
        keys, values = self.unrotated(normed)
        rotated, _ = self.attention.rotary_emb(positions, keys.flatten(1), None)
        return rotated.view(keys.shape), values

    def unrotated(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """The same, of which the keys are not rotated."""
        attention = self.attention
        if self._split:
            merged = self._rows(normed, attention.q_size, None)
        else:
            self._merged, _ = attention.qkv_proj(normed)
            merged = self._merged[:, attention.q_size :]
        keys, values = merged.split(attention.kv_size, dim=-1)
        heads = (-1, attention.num_kv_heads, attention.head_dim)
        return self._normed(keys, "k_norm").view(heads), values.view(heads)

    @property
    def rotation(self) -> dict[str, Any] | None:
        """What `apply_rotary_and_cache_` takes to rotate keys as `keys_and_values` does; None: it cannot."""
        if not self._rotates_by_table:
            return None
        rotary = self.attention.rotary_emb
        cos, sin = rotary.cos_sin_cache.chunk(2, dim=-1)
        return {"cos": cos, "sin": sin, "interleaved": not rotary.is_neox_style, "rotary_dim": rotary.rotary_dim}

    @cached_property
    def _rotates_by_table(self) -> bool:
        """Whether the rotary embedding has vLLM's plain forward, by a table of cosines, then sines. Kinds that differ
        in their angles alone have.
        """
        from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

        kind, forwards = type(self.attention.rotary_emb), (n for n in dir(RotaryEmbedding) if n.startswith("forward"))
        return all(getattr(kind, name, None) is getattr(RotaryEmbedding, name) for name in forwards)

    def queries(self, selected: Tensor, positions: Tensor, rows: Tensor) -> Tensor:
        """Rotated queries ``[n, heads, head_dim]``.

        Args:
            selected: the chosen rows of what `keys_and_values` was given last; positions: int64 ``[n]``.
            rows: int32 ``[n]``, which these are; -1 for none.
        """
        attention = self.attention
        if self._split:
            queries = self._rows(selected, 0, attention.q_size)
        else:
            assert self._merged is not None  # keys and values come first
            queries = self._merged[:, : attention.q_size].index_select(0, rows.clamp(min=0))
            self._merged = None
        queries = self._normed(queries, "q_norm")
        queries, _ = attention.rotary_emb(positions, queries, None)
        if getattr(attention, "do_llama_4_scaling", False):
            queries = (queries * attention._get_llama_4_attn_scale(positions)).to(queries.dtype)
        return queries.view(-1, attention.num_heads, attention.head_dim)

    def _rows(self, x: Tensor, begin: int, end: int | None) -> Tensor:
        """The product of ``x`` with these rows of the merged weight."""
        layer = self.attention.qkv_proj
        bias = None if layer.bias is None else layer.bias[begin:end]
        return linear(x, layer.weight[begin:end], bias)

    def _normed(self, x: Tensor, name: str) -> Tensor:
        """``x`` with the attention's norm of that name (Qwen3) on each head."""
        norm = getattr(self.attention, name, None)
        if norm is None:
            return x
        heads = x.reshape(-1, self.attention.head_dim)
        return norm(heads).view(x.shape)


def _is_plain(layer: Any, rows: int) -> bool:
    """Whether the merged weight is there as a matrix and is used as one."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    weight = getattr(layer, "weight", None)
    return (
        type(getattr(layer, "quant_method", None)) is UnquantizedLinearMethod
        and isinstance(weight, torch.Tensor)
        and weight.dim() == 2
        and weight.shape[0] == rows
    )
