"""The maps of a corrected plan, in closed form: on a text, from the lowest layer to the highest, without training.

Each layer is fitted on the states that the corrected layers below it leave. A map is a ridge regression of what is
missing from a left-out token on the token's normed state, of which the leading directions of its outputs are kept.
Only sums over tokens are needed (``X'X`` and ``X'Y``), so what is fitted on may be as long as one likes; the states of
all windows are kept meanwhile, in host memory, twice where the dense model's are the target.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calibration.regression import Moments, fit_map
from orthorank.calibration.thresholds import RANKED_BY, check_windows, choose_threshold, record_of
from orthorank.common.errors import OrthoRankError, check_choice, check_integer
from orthorank.config import OrthoRankConfig
from orthorank.correction import Correction, LayerMap
from orthorank.hf.apply import check_plan
from orthorank.hf.correction import corrected, may_be_left_out, on
from orthorank.hf.families import device_of
from orthorank.hf.provenance import provenance
from orthorank.stack.layers import LayerStack, Pass
from orthorank.stack.resources import windows_at_once
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnLayer = Callable[[int, int, float | None], None]
TARGETS = ("dense", "layer")
SELECTED_BY = ("select", "select_window")
HELD_OUT = 4  # every fourth window is held out: it chooses the ridge, and says what the map explains


def fit_correction(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: OrthoRankConfig,
    *,
    rank: int = 64,
    target: str = "dense",
    batch_size: int | None = None,
    on_layer: OnLayer | None = None,
) -> OrthoRankConfig:
    """``plan`` with a map for each of its layers that leaves tokens out, fitted to ``input_ids``.

    What a map has learnt is the text it was fitted on: give windows of every kind of text that is to come, in equal
    shares. A few thousand tokens are enough for a model of 576 channels; more channels want more.

    Args:
        model: without a plan applied, in eval mode.
        input_ids: int64 ``[windows, tokens]``, 2 windows or more, each a text of its own. Every fourth is held out: it
            chooses the strength of the ridge and measures what is explained; the maps themselves are fitted on all.
        plan: which tokens its layers leave out. With ``select="threshold"`` each threshold is found again, on the
            states that the corrected layers below leave, before the layer's map is. An earlier correction is dropped.
        rank: of the maps, at most the hidden size.
        target: ``"dense"``: what the dense model's state after the layer has more than the token's; it also repairs
            what the layers below got wrong. ``"layer"``: what the layer itself would have added.
        batch_size: windows in one forward; None: by the free memory. It changes maps by rounding only.
        on_layer: called after each layer as ``on_layer(layers done, layers in all, share explained or None)``.

    Returns:
        A new plan. ``calibration["correction"]`` says what the maps were fitted on, and for each layer the share of
        what is missing that the map explains on held-out windows, ``1 - |y - map(x)|² / |y|²``.

    Raises:
        OrthoRankError: the plan leaves nothing out or is another model's, the model is in training mode, or an
            argument is out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.arange(240).view(8, 30) % 64
        >>> found = fit_correction(model, ids, OrthoRankConfig(layers=[1, 2], keep_ratios={2: 0.0}), rank=4)
        >>> found.correction, sorted(found.calibration["correction"]["explained"])
        (Correction(rank=4, layers=[1, 2]), ['1', '2'])
    """
    check_plan(model, plan)
    check_windows(model, input_ids, least=2)
    check_choice("target", target, TARGETS)
    check_integer("rank", rank, 1, model.config.get_text_config().hidden_size)
    plan = dataclasses.replace(plan, correction=None)
    if not any(ratio < 1 for ratio in plan.ratios.values()):
        raise OrthoRankError(
            f"the plan leaves no token out (layers {plan.layers}, keep_ratio {plan.keep_ratio:g}); a correction is for "
            "layers whose ratio is below 1"
        )
    work = _Work(LayerStack(model), input_ids, plan, rank, target == "dense", batch_size)
    explained: dict[int, float] = {}
    maps: dict[int, LayerMap] = {}
    for layer in range(work.last + 1):
        if plan.ratio(layer) < 1:
            maps[layer], explained[layer] = work.fit(layer)
        else:
            work.pass_through(layer)
        if on_layer is not None:
            on_layer(layer + 1, work.last + 1, explained.get(layer))
    record = record_of(input_ids) | {
        "rank": rank,
        "target": target,
        "tokens": input_ids.numel(),
        "held_out_windows": int(work.held_out.sum()),
        **provenance(model),
        "ridge": {str(layer): ridge for layer, ridge in work.ridges.items()},
        "explained": {str(layer): round(share, 4) for layer, share in explained.items()},
    }
    records: dict[str, Any] = {"correction": record}
    if work.thresholds:
        achieved = {str(layer): round(share, 6) for layer, share in work.achieved.items()}
        records["thresholds"] = record_of(input_ids) | {"achieved": achieved}
    return dataclasses.replace(
        plan,
        correction=Correction(maps),
        thresholds=work.thresholds,
        calibration=plan.calibration | records,
        measured={},  # figures of the plan without maps
        version=__version__,
    )


class _Work:
    """The states of all windows on their way up: under the corrected plan, and in the dense model where it is wanted.

    Args:
        dense: whether the dense model's states are the target.
    """

    def __init__(
        self,
        stack: LayerStack,
        input_ids: Tensor,
        plan: OrthoRankConfig,
        rank: int,
        dense: bool,
        batch_size: int | None,
    ) -> None:
        self.stack, self.input_ids, self.plan, self.rank, self.dense = stack, input_ids, plan, rank, dense
        self.last = max(layer for layer in plan.layers if plan.ratio(layer) < 1)
        windows, tokens = input_ids.shape
        device, weight = device_of(stack.model), next(stack.model.parameters())
        size = batch_size or windows_at_once(stack.model.config, windows, tokens, device, weight.element_size())
        self.passes = [stack.embed(batch) for batch in input_ids.to(device).split(size)]
        self.states = [each.hidden_states.cpu() for each in self.passes]
        self.targets = list(self.states)  # the same tensors, until a layer leaves something out
        numbers = torch.arange(windows)
        self.held_out = numbers % HELD_OUT == HELD_OUT - 1 if windows >= HELD_OUT else numbers == windows - 1
        self.ridges: dict[int, float] = {}
        self.thresholds: dict[int, float] = {}
        self.achieved: dict[int, float] = {}

    def pass_through(self, layer: int) -> None:
        """A dense layer."""
        for i, inputs in enumerate(self.passes):
            apart = self.targets[i] is not self.states[i]
            self.states[i] = self.stack.run(layer, self.states[i], inputs).cpu()
            if self.dense and apart:
                self.targets[i] = self.stack.run(layer, self.targets[i], inputs).cpu()
            else:
                self.targets[i] = self.states[i]

    @torch.no_grad()
    def fit(self, layer: int) -> tuple[LayerMap, float]:
        """A layer that leaves tokens out: its threshold, its map and the share that it explains; then its states."""
        options: dict[str, Any] = {name: getattr(self.plan, name) for name in (*RANKED_BY, *SELECTED_BY)}
        if self.plan.select == "threshold" and self.plan.ratio(layer) > 0:
            options["thresholds"] = {layer: self._find_threshold(layer)}
        fitted, held = Moments(), Moments()
        is_held = iter(self.held_out.tolist())
        kept = []
        for i, inputs in enumerate(self.passes):
            from_states = self.targets[i] if self.dense else self.states[i]
            wanted = self.stack.run(layer, from_states, inputs).cpu()
            if self.dense:
                self.targets[i] = wanted
            chosen, rows = self._selected(layer, i, options)
            kept.append((chosen, rows))
            normed, left = self._normed(layer, i), self._left_out(i) & ~chosen
            for x, y, where in zip(normed, wanted - self.states[i], left, strict=True):
                moments = held if next(is_held) else fitted
                moments.add(x[where.to(x.device)], y[where].to(x.device))
        layer_map, explained, self.ridges[layer] = fit_map(fitted, held, self.rank)
        if layer < self.last:
            for i, (chosen, rows) in enumerate(kept):
                normed = self._normed(layer, i)
                here = self.states[i].to(normed.device)
                call = self.passes[i].call.on(normed.device)
                self.states[i] = corrected(here, normed, call, on(layer_map, normed.device)).cpu()
                self.states[i][chosen] = rows
        return layer_map, explained

    def _normed(self, layer: int, i: int) -> Tensor:
        """The input norm of the states of batch ``i``, on the layer's device."""
        return self.stack.normed(layer, self.states[i].to(device_of(self.stack.layers[layer])))

    def _left_out(self, i: int) -> Tensor:
        """Which tokens of batch ``i`` are no sinks: bool ``[windows, tokens]``."""
        may = may_be_left_out(self.passes[i].call, torch.device("cpu"))
        assert may is not None  # a window begins with its sink
        return may.expand(self.states[i].shape[:2])

    def _selected(self, layer: int, i: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Which tokens of batch ``i`` the layer updates, bool ``[windows, tokens]``, and their states after it."""
        windows, tokens, hidden = self.states[i].shape
        chosen = torch.zeros(windows, tokens + 1, dtype=torch.bool)
        if self.plan.ratio(layer) == 0:
            return chosen[:, :tokens], self.states[i].new_empty(0, hidden)

        def note(_: int, positions: Tensor, __: Any) -> None:
            at = positions.long().cpu()
            chosen.scatter_(1, torch.where(at < 0, tokens, at), True)

        inputs = self.passes[i]
        watched = Pass(inputs.hidden_states, inputs.layer_kwargs, dataclasses.replace(inputs.call, watcher=note))
        after = self.stack.run(layer, self.states[i], watched, self.plan.ratio(layer), **options).cpu()
        return chosen[:, :tokens], after[chosen[:, :tokens]]

    def _find_threshold(self, layer: int) -> float:
        ranked = {name: getattr(self.plan, name) for name in RANKED_BY}
        pairs = zip(self.states, self.passes, strict=True)
        ranks = [self.stack.ranks(layer, h, inputs, **ranked)[:, 1:].flatten().cpu() for h, inputs in pairs]
        threshold, updated = choose_threshold(torch.cat(ranks), self.plan, layer, self.input_ids)
        self.thresholds[layer], self.achieved[layer] = threshold, updated / self.input_ids.numel()
        return threshold
