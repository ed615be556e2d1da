"""Corrected layers fitted one at a time, on windows whose states the layers below have left."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthorank.calibration.regression import RIDGES, Moments, fit_map
from orthorank.calibration.threshold import RANKED_BY, find_threshold
from orthorank.correction import LayerMap
from orthorank.families.known import device_of
from orthorank.hf.correction import corrected
from orthorank.stack.layers import Pass
from orthorank.stack.resources import windows_at_once

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig
    from orthorank.stack.layers import LayerStack

SELECTED_BY = ("select", "select_window", "keep_multiple")
HELD_OUT = 4  # every fourth window is held out: it chooses the ridge, and says what the map explains


class Fitted(NamedTuple):
    """A corrected layer.

    Args:
        layer_map: in float32. explained: the share of what is missing that it explains in held-out windows; ridge: see
            `orthorank.calibration.regression.fit_map`.
        threshold, achieved: with ``select="threshold"``, below which score tokens are updated, and which share is.
    """

    layer_map: LayerMap
    explained: float
    ridge: float
    threshold: float | None = None
    achieved: float | None = None


class FitWindows:
    """Windows to fit on, in batches. States are given and returned a batch at a time, ``[windows, tokens, hidden]``.

    Args:
        stack: the model, layer by layer.
        input_ids: int64 ``[windows, tokens]``, 2 windows or more.
        plan: how its layers rank and select tokens. With ``thresholds`` each layer's threshold is found before its map,
            else tokens are selected as the plan has it.
        batch_size: windows in one forward; None: by the free memory.
    """

    ridges: Sequence[float] = RIDGES  # of which each layer gets the one that held-out windows choose

    def __init__(
        self,
        stack: "LayerStack",
        input_ids: Tensor,
        plan: "OrthoRankConfig",
        *,
        thresholds: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.stack, self.input_ids, self.plan, self.thresholds = stack, input_ids, plan, thresholds
        windows, tokens = input_ids.shape
        device, size = device_of(stack.model), stack.model.dtype.itemsize
        self.batch_size = batch_size or windows_at_once(stack.model.config, windows, tokens, device, size)
        self._batches = input_ids.to(device).split(self.batch_size)
        self.passes = [_without_states(stack.embed(batch)) for batch in self._batches]
        self.held_out = held_out(windows)
        names = RANKED_BY if thresholds else (*RANKED_BY, *SELECTED_BY)
        self._options: dict[str, Any] = {name: getattr(plan, name) for name in names}

    def embedded(self) -> Iterator[Tensor]:
        """The input of layer 0, a copy."""
        return (self.stack.embed(batch).hidden_states.to("cpu", copy=True) for batch in self._batches)

    def dense(self, layer: int, states: Sequence[Tensor]) -> Iterator[Tensor]:
        """What the dense ``layer`` makes of ``states``, batch by batch."""
        return (self.stack.run(layer, h, inputs).cpu() for h, inputs in zip(states, self.passes, strict=True))

    @torch.no_grad()
    def fit(self, layer: int, ratio: float, rank: int, states: Sequence[Tensor], wanted: Iterable[Tensor]) -> Fitted:
        """Fit the map of ``layer``, and write what it leaves into ``states``, in place.

        Args:
            ratio: the share of tokens that it updates, below 1.
            wanted: what its output should be for the tokens it leaves out.

        Raises:
            OrthoRankError: it leaves none out, or (with thresholds) no threshold divides its scores.
        """
        threshold = achieved = None
        if self.thresholds and ratio > 0:
            threshold, achieved = find_threshold(self.stack, layer, states, self.passes, self.plan, self.input_ids)
        fitted, held = Moments(), Moments()
        is_held, chosen = iter(self.held_out.tolist()), []
        for i, (h, y) in enumerate(zip(states, wanted, strict=True)):
            normed, missing = self._normed(layer, h), y - h
            chosen.append(self._update_selected(layer, ratio, i, h, threshold))
            left_out = without_sinks(~chosen[i])
            for x, short, where in zip(normed, missing, left_out, strict=True):
                sums = held if next(is_held) else fitted
                sums.add(x[where.to(x.device)], short[where].to(x.device))
        layer_map, explained, ridge = fit_map(fitted, held, rank, self.ridges)
        for i, h in enumerate(states):
            self._correct(layer, layer_map, i, h, chosen[i])
        return Fitted(layer_map, explained, ridge, threshold, achieved)

    @torch.no_grad()
    def follow(self, layer: int, ratio: float, fitted: Fitted, states: Sequence[Tensor]) -> None:
        """Write what a layer leaves that is fitted already into ``states``, as `fit` does."""
        for i, h in enumerate(states):
            options = self._how(layer, fitted.threshold)
            h.copy_(self.stack.run(layer, h, self.passes[i], ratio, layer_map=fitted.layer_map, **options))

    def _normed(self, layer: int, state: Tensor) -> Tensor:
        """The input norm of a batch, on the layer's device."""
        return self.stack.normed(layer, state.to(device_of(self.stack.layers[layer])))

    def _correct(self, layer: int, layer_map: LayerMap, i: int, state: Tensor, chosen: Tensor) -> None:
        """Correct the tokens of batch ``i`` that are not chosen, in place."""
        normed = self._normed(layer, state)
        call = self.passes[i].call.on(normed.device)
        after = corrected(state.to(normed.device), normed, call, layer_map).cpu()
        state.copy_(torch.where(chosen[..., None], state, after))

    def _update_selected(self, layer: int, ratio: float, i: int, state: Tensor, threshold: float | None) -> Tensor:
        """Write the states of the tokens that ``layer`` selects into ``state``; which they are, bool, comes back."""
        if ratio == 0:
            return torch.zeros(state.shape[:2], dtype=torch.bool)
        after, chosen = run_noting(self.stack, layer, state, self.passes[i], ratio, **self._how(layer, threshold))
        state[chosen] = after.cpu()[chosen]
        return chosen

    def _how(self, layer: int, threshold: float | None) -> dict[str, Any]:
        """By what a layer selects."""
        by = {} if threshold is None else {"select": "threshold", "thresholds": {layer: threshold}}
        return self._options | by


def run_noting(
    stack: "LayerStack", layer: int, state: Tensor, inputs: Pass, ratio: float, **options: Any
) -> tuple[Tensor, Tensor]:
    """What a layer that selects leaves, as `LayerStack.run`; which tokens it selected, bool ``[windows, tokens]``."""
    windows, tokens, _ = state.shape
    chosen = torch.zeros(windows, tokens + 1, dtype=torch.bool)

    def note(_: int, positions: Tensor, __: Any) -> None:
        at = positions.long().cpu()
        chosen.scatter_(1, torch.where(at < 0, tokens, at), True)

    watched = Pass(inputs.hidden_states, inputs.layer_kwargs, replace(inputs.call, watcher=note))
    return stack.run(layer, state, watched, ratio, **options), chosen[:, :tokens]


def without_sinks(tokens: Tensor) -> Tensor:
    """``tokens``, bool ``[windows, tokens]``, but the first of each window, which is its sink."""
    return tokens.index_fill(1, torch.tensor([0]), False)


def _without_states(inputs: Pass) -> Pass:
    """What layers get beside the states: those of all windows are not held a second time."""
    return replace(inputs, hidden_states=inputs.hidden_states.new_empty(0))


def held_out(windows: int) -> Tensor:
    """Which of ``windows`` windows are held out from the choice of the ridge: bool ``[windows]``.

    >>> held_out(5).tolist(), held_out(2).tolist()
    ([False, False, False, True, False], [False, True])
    """
    numbers = torch.arange(windows)
    return numbers % HELD_OUT == HELD_OUT - 1 if windows >= HELD_OUT else numbers == windows - 1
