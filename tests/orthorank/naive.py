"""OrthoRank stated another way, to test against: run the dense layer on everything, keep the selected rows of it.

A selected token's update depends on its own query and on the keys and values of all tokens, which is what the dense
layer computes for that token. So ``h' = where(selected, dense_layer(h), h)``, with no sparse attention and no gather.
"""

from typing import Any

import torch
from torch import Tensor


def selected_mask(scores: Tensor, k: int, keep_last: int = 0) -> Tensor:
    """Bool ``[tokens]``: the k smallest of ``scores`` by (score, position); token 0, the sink, last of all."""
    tokens = len(scores)
    forced = set(range(max(1, tokens - keep_last), tokens)) if keep_last else set()
    order = [*sorted(range(1, tokens), key=lambda i: (i not in forced, float(scores[i]), i)), 0]
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


@torch.no_grad()
def logits(model: Any, ids: Tensor, layers: list[int], k: int, keep_last: int = 0, sign: float = 1.0) -> Tensor:
    """Logits ``[1, tokens, vocabulary]`` of one unpadded row ``ids`` ``[1, tokens]`` under a plan."""

    def select(module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
        h = args[0]
        x = module.input_layernorm(h)[0].double()
        mask = selected_mask(sign * (x @ x[0]).abs(), k, keep_last)
        return torch.where(mask[None, :, None], output, h)

    hooks = [model.model.layers[layer].register_forward_hook(select) for layer in layers]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def without_layers(model: Any, layers: list[int]) -> Any:
    """A deep copy of ``model`` in which ``layers`` do not exist."""
    import copy

    pruned = copy.deepcopy(model)
    kept = [layer for i, layer in enumerate(pruned.model.layers) if i not in layers]
    pruned.model.layers = torch.nn.ModuleList(kept)
    for i, layer in enumerate(kept):
        layer.self_attn.layer_idx = i
    if getattr(pruned.config, "layer_types", None) is not None:
        pruned.config.layer_types = [t for i, t in enumerate(pruned.config.layer_types) if i not in layers]
    pruned.config.num_hidden_layers = len(kept)
    return pruned


def assert_close(actual: Tensor, expected: Tensor, relative: float = 1e-5) -> None:
    """Largest difference below ``relative`` times the largest absolute expected value."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    worst = (actual - expected).abs().max() / expected.abs().max()
    assert worst < relative, f"differs by {worst:.2e} of the scale, allowed {relative:.0e}"
