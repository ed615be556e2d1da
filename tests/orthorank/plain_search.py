"""SLEB's loop as it is written down, without any reuse, and a small model whose layers differ in worth."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from orthorank.stack.layers import LayerStack
from tests.orthorank.models import plain

LAYERS = 7
SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": None,
}


def small_stack(**overrides: Any) -> LayerStack:
    """A seeded Llama of `LAYERS` layers."""
    return LayerStack(plain("llama", **SMALL | overrides))


def random_windows(count: int = 4, tokens: int = 24) -> Tensor:
    """Seeded ids ``[count, tokens]``."""
    return torch.randint(0, 64, (count, tokens), generator=torch.Generator().manual_seed(1))


def plain_loss(
    stack: LayerStack,
    windows: Tensor,
    plan: Mapping[int, float],
    criterion: str = "orthogonal",
    batch_size: int = 1,
) -> float:
    """The loss of a plan, everything computed anew; summed window by window."""
    sums: list[float] = []
    for ids in windows.split(batch_size):
        inputs = stack.embed(ids)
        hidden = inputs.hidden_states
        for layer in range(stack.num_layers):
            hidden = stack.run(layer, hidden, inputs, plan.get(layer, 1.0), criterion)
        sums += stack.token_losses(hidden, ids).double().sum(1).tolist()
    return sum(sums) / (windows.shape[0] * (windows.shape[1] - 1))


def plain_search(
    stack: LayerStack,
    windows: Tensor,
    candidates: Iterable[int],
    rounds: int,
    keep_ratio: float,
    criterion: str = "orthogonal",
) -> tuple[list[int], list[float], dict[tuple[int, int], float]]:
    """The plan in the order of the rounds, its losses, and every loss seen by (round, layer)."""
    chosen: list[int] = []
    losses: list[float] = []
    seen: dict[tuple[int, int], float] = {}
    for number in range(rounds):
        best, best_layer = math.inf, -1
        for layer in candidates:
            if layer in chosen:
                continue
            loss = plain_loss(stack, windows, dict.fromkeys([*chosen, layer], keep_ratio), criterion)
            seen[number, layer] = loss
            if loss < best:
                best, best_layer = loss, layer
        chosen.append(best_layer)
        losses.append(best)
    return chosen, losses, seen
