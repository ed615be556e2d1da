"""Thresholds for ``select="threshold"``: on a text, from the lowest layer to the highest.

A layer's threshold lies halfway between two neighbouring scores of the calibration tokens, so that the wanted share of
them scores less. Below it the layers select by the thresholds found already: each is calibrated on the states that it
will see. One pass over the text, up to the last selecting layer, is all the work.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from orthorank.calibration.threshold import RANKED_BY, find_threshold
from orthorank.calibration.windows import check_windows, record_of
from orthorank.common.criteria import check_pointwise
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.families.known import device_of
from orthorank.hf.apply import check_plan
from orthorank.stack.layers import LayerStack
from orthorank.stack.resources import windows_at_once
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnLayer = Callable[[int, int, float | None], None]


def calibrate(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: OrthoRankConfig,
    *,
    keep_ratio: float | None = None,
    decode: str | None = None,
    keep_last: int | None = None,
    batch_size: int | None = None,
    on_layer: OnLayer | None = None,
) -> OrthoRankConfig:
    """``plan`` with a threshold for each layer that selects, calibrated to its keep ratio.

    The maps of a corrected plan are fitted anew, to what the new thresholds leave out: each layer's threshold first, on
    the states that the corrected layers below leave, then its map.

    The sink counts among the tokens of a window and is never selected, as in a prompt (with ``update_sink``: always).

    Args:
        model: without a plan applied, in eval mode.
        input_ids: int64 ``[windows, tokens]``, each window a text of its own.
        plan: which layers, and how they rank tokens; its way to select is replaced.
        keep_ratio: of the layers without one of their own in ``plan.keep_ratios``; None: the plan's.
        decode, keep_last: of the new plan; None: as they are.
        batch_size: windows in one forward; None: by the free memory. It changes thresholds by rounding only.
        on_layer: called after each layer as ``on_layer(layers done, layers in all, threshold or None)``.

    Returns:
        A new plan, with what it was calibrated on and the ratios achieved there in ``calibration["thresholds"]``.

    Raises:
        OrthoRankError: the plan selects nothing or is another model's, or there are too few tokens for its ratios.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.arange(60).view(2, 30)
        >>> plan = calibrate(model, ids, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4))
        >>> sorted(plan.thresholds), plan.calibration["thresholds"]["achieved"]
        ([1, 2], {'1': 0.4, '2': 0.4})
    """
    check_plan(model, plan)
    check_windows(model, input_ids)
    check_pointwise(plan.criterion, "thresholds; use select 'topk' or 'window'")
    changes: dict[str, Any] = {"keep_multiple": 1, "keep_ratio": keep_ratio, "decode": "dense", "keep_last": keep_last}
    wanted = _with(plan, **{name: value for name, value in changes.items() if value is not None})
    if not wanted.selecting:
        raise OrthoRankError(
            f"the plan selects in no layer (layers {wanted.layers}, keep_ratio {wanted.keep_ratio:g}); thresholds are "
            "for layers whose ratio is above 0 and below 1"
        )
    if plan.correction is not None:
        return _with_maps(model, input_ids, wanted, plan.decode if decode is None else decode, batch_size, on_layer)
    thresholds, achieved = _thresholds(LayerStack(model), input_ids, wanted, batch_size, on_layer)
    record = record_of(input_ids) | {"achieved": {str(layer): round(share, 6) for layer, share in achieved.items()}}
    return dataclasses.replace(
        wanted,
        select="threshold",
        thresholds=thresholds,
        decode=plan.decode if decode is None else decode,
        calibration=plan.calibration | {"thresholds": record},
        measured={},  # figures of another selection
        version=__version__,
    )


def _thresholds(
    stack: LayerStack, input_ids: Tensor, plan: OrthoRankConfig, batch_size: int | None, on_layer: OnLayer | None
) -> tuple[dict[int, float], dict[int, float]]:
    """Threshold and achieved ratio of each selecting layer."""
    device, weight = device_of(stack.model), next(stack.model.parameters())
    windows, tokens = input_ids.shape
    size = batch_size or windows_at_once(stack.model.config, windows, tokens, device, weight.element_size())
    passes = [stack.embed(batch) for batch in input_ids.to(device).split(size)]
    states = [each.hidden_states for each in passes]
    ranked: dict[str, Any] = {name: getattr(plan, name) for name in RANKED_BY}
    thresholds: dict[int, float] = {}
    achieved: dict[int, float] = {}
    last = plan.selecting[-1]
    for layer in range(last + 1):
        options: dict[str, Any] = {}
        if layer in plan.selecting:
            thresholds[layer], achieved[layer] = find_threshold(stack, layer, states, passes, plan, input_ids)
            options = ranked | {"select": "threshold", "thresholds": {layer: thresholds[layer]}}
        if layer < last:
            for i, inputs in enumerate(passes):
                states[i] = stack.run(layer, states[i], inputs, plan.ratio(layer), **options)
        if on_layer is not None:
            on_layer(layer + 1, last + 1, thresholds.get(layer))
    return thresholds, achieved


def _with_maps(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: OrthoRankConfig,
    decode: str,
    batch_size: int | None,
    on_layer: OnLayer | None,
) -> OrthoRankConfig:
    """A corrected plan with new thresholds, each found on corrected states, and new maps for what they leave out."""
    from orthorank.calibration.corrections import check_fit, corrected_plan, fit_layers  # for corrected plans alone

    assert plan.correction is not None
    rank, target = plan.correction.rank, plan.calibration.get("correction", {}).get("target", "dense")
    check_fit(model, input_ids, plan, rank, target)
    fits = {}
    walk = fit_layers(model, input_ids, plan, rank=rank, target=target, thresholds=True, batch_size=batch_size)
    for layer, total, fitted in walk:
        if fitted is not None:
            fits[layer] = fitted
        if on_layer is not None:
            on_layer(layer + 1, total, None if fitted is None else fitted.threshold)
    return corrected_plan(model, input_ids, plan, fits, rank, target, select="threshold", decode=decode)


def _with(plan: OrthoRankConfig, **changes: Any) -> OrthoRankConfig:
    """``plan`` with ``changes``, and without a way to select beside them."""
    return dataclasses.replace(plan, select="topk", select_window=None, thresholds={}, **changes)
