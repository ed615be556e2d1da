"""The naive statement with a rule for each layer: which of a row's tokens it updates, from their scores."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.orthorank.naive import ranks, selected_mask

Rule = Callable[[Tensor], Tensor]  # from a row's scores, fp64 [tokens], to the updated tokens, bool [tokens]


@torch.no_grad()
def logits_by_rule(model: Any, ids: Tensor, rules: dict[int, Rule], criterion: str = "orthogonal") -> Tensor:
    """Logits of one unpadded row ``[1, tokens]``, each layer of ``rules`` updating the tokens that its rule says."""

    def hook(rule: Rule) -> Any:
        def select(module: Any, args: tuple[Any, ...], output: Any) -> Tensor:
            h = args[0]
            scores = ranks(criterion, h[0], module.input_layernorm(h)[0])
            return torch.where(rule(scores)[None, :, None], output, h)

        return select

    hooks = [model.model.layers[layer].register_forward_hook(hook(rule)) for layer, rule in rules.items()]
    try:
        return model(ids, use_cache=False).logits
    finally:
        for one in hooks:
            one.remove()


def windows_mask(scores: Tensor, window: int, ratio: float, keep_last: int = 0, update_sink: bool = False) -> Tensor:
    """The smallest of each window of ``window`` tokens; ``keep_last`` counts in the windows where it falls."""
    masks, tokens = [], len(scores)
    for begin in range(0, tokens, window):
        end = min(tokens, begin + window)
        forced = min(end - begin, max(0, end - (tokens - keep_last)))
        k = int(ratio * (end - begin) + 1e-6)
        first = begin == 0
        if forced or (first and update_sink):
            k = min(end - begin - (first and not update_sink), max(k, forced + (first and update_sink)))
        masks.append(selected_mask(scores[begin:end], k, forced, update_sink, sink_inside=first))
    return torch.cat(masks)


def below(tau: float) -> Rule:
    """Every token but the sink that scores less than ``tau``."""
    return lambda scores: (scores < tau) & (torch.arange(len(scores)) > 0)
