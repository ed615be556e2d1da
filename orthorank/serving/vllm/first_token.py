"""First tokens of requests through vLLM's layers, alone: what every selecting layer compares the others with."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig


@torch.inference_mode()
def first_token_states(model: Any, plan: "OrthoRankConfig", tokens: Sequence[int]) -> Tensor:
    """The normed states of ``tokens``, each at position 0, in each selecting layer: ``[tokens, selecting, hidden]``.

    Attention to one key gives its value back, so neither cache nor positions matter, and the tokens are one batch.
    Selecting layers leave them as they are. All ranks of a tensor-parallel group compute this together.

    Args:
        model: vLLM's inner model (embedding and layers), with its weights; plan: which layers select.
    """
    device = next(model.parameters()).device
    hidden = model.embed_input_ids(torch.tensor(tokens, device=device))
    residual: Tensor | None = None
    states = []
    for index, layer in enumerate(model.layers[: plan.selecting[-1] + 1]):
        ratio = plan.ratio(index)
        if ratio == 0:
            continue
        residual = hidden.clone() if residual is None else hidden + residual
        normed = layer.input_layernorm(residual.clone())
        if ratio < 1:
            states.append(normed)
            hidden = torch.zeros_like(hidden)
            continue
        attn_out = _attend_to_itself(layer.self_attn, normed)
        residual = residual + attn_out
        hidden = layer.mlp(layer.post_attention_layernorm(residual.clone()))
    return torch.stack(states, dim=1)


def _attend_to_itself(attention: Any, normed: Tensor) -> Tensor:
    merged, _ = attention.qkv_proj(normed)
    values = merged[:, -attention.kv_size :].view(-1, attention.num_kv_heads, attention.head_dim)
    heads = values.repeat_interleave(attention.num_heads // attention.num_kv_heads, dim=1)
    projected, _ = attention.o_proj(heads.flatten(1))
    return projected
