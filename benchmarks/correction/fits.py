"""Fits that the package does not have: maps of keys and values, and maps for the tokens that a layer selects, too."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from orthorank.calibration.fitting import Fitted, FitWindows, run_noting, without_sinks
from orthorank.calibration.regression import Moments, fit_map
from orthorank.correction import LayerMap
from orthorank.stack.layers import LayerStack, Pass

ROUNDING = 1e-8  # of the squares of states: what two ways to compute the same may differ by


class KeyValueWindows(FitWindows):
    """The regressors are the token's keys and values before the rotary embedding, which its layer computes anyway.

    Both are products of the normed state, so what comes of it is a map like any other, of fewer freedoms.
    """

    def _weight(self, layer: int) -> Tensor:
        attention = self.stack.layers[layer].self_attn
        return torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach()

    def _normed(self, layer: int, state: Tensor) -> Tensor:
        return super()._normed(layer, state) @ self._weight(layer).T

    def fit(self, layer: int, ratio: float, rank: int, states: Sequence[Tensor], wanted: Iterable[Tensor]) -> Fitted:
        found = super().fit(layer, ratio, rank, states, wanted)
        down, up, bias = found.layer_map
        return found._replace(layer_map=LayerMap(down @ self._weight(layer).to(down), up, bias))


class BothWindows(FitWindows):
    """Selected tokens get a map of their own: what the dense model's state has more than what their layer made of them.

    Args:
        also: the maps of selected tokens, by layer.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.also: dict[int, LayerMap] = {}
        self._chosen: dict[int, Tensor] = {}

    def _update_selected(self, layer: int, ratio: float, i: int, state: Tensor, threshold: float | None) -> Tensor:
        self._chosen[i] = super()._update_selected(layer, ratio, i, state, threshold)
        return self._chosen[i]

    @torch.no_grad()
    def fit(self, layer: int, ratio: float, rank: int, states: Sequence[Tensor], wanted: Iterable[Tensor]) -> Fitted:
        wanted = list(wanted)
        before = [self._normed(layer, h) for h in states]
        found = super().fit(layer, ratio, rank, states, wanted)
        if ratio == 0:
            return found
        fitted, held = Moments(), Moments()
        is_held = iter(self.held_out.tolist())
        which = [without_sinks(self._chosen[i]) for i in range(len(states))]
        for h, y, normed, where in zip(states, wanted, before, which, strict=True):
            for x, short, at in zip(normed, y - h, where, strict=True):
                (held if next(is_held) else fitted).add(x[at], short[at])
        if fitted.yy <= ROUNDING * sum(float(h[at].square().sum()) for h, at in zip(states, which, strict=True)):
            return found  # all layers below are dense: nothing is missing
        self.also[layer] = fit_map(fitted, held, rank, self.ridges)[0]
        for h, normed, where in zip(states, before, which, strict=True):
            h[where] += mapped(self.also[layer], normed[where])
        return found


def mapped(layer_map: LayerMap, normed: Tensor) -> Tensor:
    """``up (down x) + bias`` of some tokens ``[tokens, hidden]``."""
    return (normed @ layer_map.down.T) @ layer_map.up.T + layer_map.bias


def run_both(
    stack: LayerStack, layer: int, hidden: Tensor, inputs: Pass, ratio: float, also: LayerMap | None, **options: Any
) -> Tensor:
    """As `LayerStack.run`, with a map ``also`` for the tokens that the layer selects."""
    if also is None:
        return stack.run(layer, hidden, inputs, ratio, **options)
    after, chosen = run_noting(stack, layer, hidden, inputs, ratio, **options)
    rows = without_sinks(chosen)
    after = after.clone()
    after[rows] += mapped(also, stack.normed(layer, hidden)[rows])
    return after
