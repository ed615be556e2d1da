"""OrthoRank stated another way, to test against: run the dense layer on everything, keep the selected rows of it.

A selected token's update depends on its own query and on the keys and values of all tokens, which is what the dense
layer computes for that token. So ``h' = where(selected, dense_layer(h), h)``, with no sparse attention and no gather.
"""

from typing import Any

import torch
from torch import Tensor


def hash_of(seed: int, layer: int, position: int) -> int:
    """The 32-bit hash behind ``criterion="random"``, in the integers of Python; all three are below 2^32."""

    def mixed(x: int) -> int:
        x ^= x // 2**16
        x = x * 0x21F0AAAD % 2**32
        x ^= x // 2**15
        x = x * 0x735A2D97 % 2**32
        return x ^ x // 2**15

    key = 0
    for number in (seed, layer):
        key = mixed(((key ^ number) + 0x9E3779B9) % 2**32)
    return mixed(mixed((position + 0x9E3779B9) % 2**32) ^ key)


def ranks(criterion: str, h: Tensor, x: Tensor, seed: int = 0, layer: int = 0) -> Tensor:
    """The smaller, the sooner selected: float64 ``[tokens]``; ``h`` and ``x`` ``[tokens, hidden]`` are before and after
    the norm."""
    h, x = h.double(), x.double()
    if criterion == "random":
        return torch.tensor([hash_of(seed, layer, i) // 2**8 for i in range(len(x))]).double()
    if criterion == "prenorm":
        return (h @ h[0]).abs()
    if criterion == "cosine":
        return torch.stack([(row @ x[0]).abs() / (row.norm() * x[0].norm()) for row in x])
    return (x @ x[0]).abs() * (-1 if criterion == "inverse" else 1)


def selected_mask(
    scores: Tensor, k: int, keep_last: int = 0, update_sink: bool = False, sink_inside: bool = True
) -> Tensor:
    """Bool ``[tokens]``: the k smallest of ``scores`` by (score, position); token 0, the sink, last, or first.

    ``sink_inside`` False: token 0 is one like the others, as in a later chunk of a prompt.
    """
    tokens = len(scores)
    forced = set(range(max(0, tokens - keep_last), tokens)) if keep_last else set()
    order = sorted(range(int(sink_inside), tokens), key=lambda i: (i not in forced, float(scores[i]), i))
    if sink_inside:
        order = [0, *order] if update_sink else [*order, 0]
    mask = torch.zeros(tokens, dtype=torch.bool)
    mask[order[:k]] = True
    return mask


@torch.no_grad()
def logits(
    model: Any,
    ids: Tensor,
    layers: list[int],
    k: int,
    keep_last: int = 0,
    sign: float = 1.0,
    *,
    criterion: str = "orthogonal",
    seed: int = 0,
    kv: str = "all",
    update_sink: bool = False,
    sinks: str = "first",
    chunks: list[tuple[int, int]] | None = None,
    seen: dict[int, list[int]] | None = None,
) -> Tensor:
    """Logits ``[1, tokens, vocabulary]`` of one unpadded row ``ids`` ``[1, tokens]`` under a plan.

    ``k`` counts the sink where it is updated. ``chunks``: tokens and k of each chunk, if the prompt comes in several;
    since later tokens change nothing for earlier ones, one pass with the tokens that each chunk selects is the same.
    ``seen``, if given, gets the selected positions of each layer.
    """

    def select(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Tensor:
        h, layer = args[0], module.self_attn.layer_idx
        x = getattr(module, "input_layernorm", torch.nn.Identity())(h)[0].double()
        scores = sign * ranks(criterion, h[0], x, seed, layer)
        if sinks == "auto":
            alike = ranks("cosine", h[0], h[0] if criterion == "prenorm" else x) >= 0.75
            scores = scores.masked_fill(alike, torch.inf)
        parts, masks = chunks or [(len(x), k)], []
        for number, (part, (_, count)) in enumerate(zip(scores.split([n for n, _ in parts]), parts, strict=True)):
            last = keep_last if number == len(parts) - 1 else 0
            masks.append(selected_mask(part, count, last, update_sink, sink_inside=number == 0))
        mask = torch.cat(masks)
        if seen is not None:
            seen[layer] = mask.nonzero().flatten().tolist()
        if kv == "selected" and mask.any():
            output = output.clone()
            output[:, mask] = among_themselves(module, h, mask, kwargs)
        return torch.where(mask[None, :, None], output, h)

    hooks = [model.model.layers[layer].register_forward_hook(select, with_kwargs=True) for layer in layers]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()


def among_themselves(module: Any, h: Tensor, mask: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The dense layer on the selected rows of ``h`` alone, at their own places."""
    at = mask.nonzero().flatten()
    config, index = module.self_attn.config, module.self_attn.layer_idx
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or kinds[index] == "sliding_attention"
    window = getattr(config, "sliding_window", None) if slides else None
    distance = at[:, None] - at[None, :]
    visible = (distance >= 0) & (distance < (window or len(mask)))
    cos, sin = kwargs["position_embeddings"]
    kwargs = kwargs | {
        "position_embeddings": (cos[:, at], sin[:, at]),
        "attention_mask": torch.where(visible, 0.0, -torch.inf)[None, None],
        "position_ids": at[None],
    }
    return type(module).forward(module, h[:, at], **kwargs)  # not the hooks, of which the caller is one


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
