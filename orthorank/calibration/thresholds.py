"""Thresholds for ``select="threshold"``: on a text, from the lowest layer to the highest.

A layer's threshold lies halfway between two neighbouring scores of the calibration tokens, so that the wanted share of
them scores less. Below it the layers select by the thresholds found already: each is calibrated on the states that it
will see. One pass over the text, up to the last selecting layer, is all the work.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.criteria import check_pointwise
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.hf.apply import check_plan
from orthorank.hf.families import device_of
from orthorank.stack.layers import LayerStack
from orthorank.stack.resources import windows_at_once
from orthorank_kernels import keep_count
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnLayer = Callable[[int, int, float | None], None]
RANKED_BY = ("criterion", "seed", "kv", "update_sink", "sinks")  # fields of a plan that its thresholds depend on


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
    if plan.correction is not None:
        raise OrthoRankError(
            "the plan is corrected, and its maps were fitted to the tokens that it leaves out now; calibrate the plan "
            "without its correction, then fit the correction: orthorank.fit_correction finds thresholds again"
        )
    check_pointwise(plan.criterion, "thresholds; use select 'topk' or 'window'")
    changes: dict[str, Any] = {"keep_ratio": keep_ratio, "decode": "dense", "keep_last": keep_last}
    wanted = _with(plan, **{name: value for name, value in changes.items() if value is not None})
    if not wanted.selecting:
        raise OrthoRankError(
            f"the plan selects in no layer (layers {wanted.layers}, keep_ratio {wanted.keep_ratio:g}); thresholds are "
            "for layers whose ratio is above 0 and below 1"
        )
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


def check_windows(model: "PreTrainedModel", input_ids: Tensor, least: int = 1) -> None:
    """``model`` is in eval mode, and ``input_ids`` are ``least`` windows of 2 tokens or more.

    Raises:
        OrthoRankError: they are not.
    """
    if model.training:
        raise OrthoRankError("model is in training mode; call model.eval() first")
    if input_ids.dim() != 2 or input_ids.shape[0] < least or input_ids.shape[1] < 2:
        windows = "one window" if least == 1 else f"{least} windows"
        raise OrthoRankError(
            f"input_ids has shape {list(input_ids.shape)}; it must be [windows, tokens] with at least {windows} of 2 "
            "tokens"
        )


def record_of(input_ids: Tensor) -> dict[str, Any]:
    """What a plan says of the windows it was calibrated on: how many of how many tokens, and their hash."""
    return {
        "ids_sha256": hashlib.sha256(input_ids.cpu().numpy().astype("<i8").tobytes()).hexdigest(),
        "windows": input_ids.shape[0],
        "seq_len": input_ids.shape[1],
    }


def threshold_for(scores: Tensor, count: int) -> tuple[float, int]:
    """The number halfway between the ``count``-th smallest of ``scores`` and the next, and how many are below it.

    Where these two are equal, halfway in the nearest gap. The number is one of float32, as which it is compared.

    Args:
        scores: float32 ``[n]``, NaN last, as sorting has it; count: from 1 to n - 1.

    >>> threshold_for(torch.tensor([4.0, 1.0, 2.0, 3.0]), 2)
    (2.5, 2)
    >>> threshold_for(torch.tensor([1.0, 2.0, 2.0, 2.0, 2.0, 3.0]), 4)
    (2.5, 5)
    """
    ordered = scores.sort().values
    gaps = (ordered.diff() > 0).nonzero().flatten() + 1  # so many are below a gap
    if len(gaps) == 0:
        raise OrthoRankError(
            f"all {len(scores)} scores are {float(ordered[0])} (or not a number): no threshold divides them; calibrate "
            "on a longer text"
        )
    below = int(gaps[(gaps - count).abs().argmin()])
    low, high = ordered[below - 1], ordered[below]
    middle = torch.tensor((float(low) + float(high)) / 2, dtype=torch.float32)
    if math.isinf(middle):  # between a number and a rank of infinity, such as a further sink's
        middle = torch.nextafter(low, high)
    return float(middle if middle > low else high), below


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
            pairs = zip(states, passes, strict=True)
            ranks = [stack.ranks(layer, h, inputs, **ranked)[:, 1:].flatten().cpu() for h, inputs in pairs]
            thresholds[layer], updated = choose_threshold(torch.cat(ranks), plan, layer, input_ids)
            achieved[layer] = updated / input_ids.numel()
            options = ranked | {"select": "threshold", "thresholds": {layer: thresholds[layer]}}
        if layer < last:
            for i, inputs in enumerate(passes):
                states[i] = stack.run(layer, states[i], inputs, plan.ratio(layer), **options)
        if on_layer is not None:
            on_layer(layer + 1, last + 1, thresholds.get(layer))
    return thresholds, achieved


def choose_threshold(ranks: Tensor, plan: OrthoRankConfig, layer: int, input_ids: Tensor) -> tuple[float, int]:
    """The threshold of ``layer``, and how many tokens it updates.

    Args:
        ranks: of all tokens that are not sinks.
    """
    total, sinks = input_ids.numel(), input_ids.shape[0] if plan.update_sink else 0
    count = keep_count(total, plan.ratio(layer)) - sinks
    if not 0 < count < len(ranks):
        raise OrthoRankError(
            f"layer {layer} is to update {plan.ratio(layer):.4g} of {total} calibration tokens, of which {len(ranks)} "
            f"are no sinks: {count} below a threshold. There must be at least one on either side: calibrate on more "
            "windows, or change keep_ratio"
        )
    threshold, below = threshold_for(ranks, count)
    return threshold, below + sinks


def _with(plan: OrthoRankConfig, **changes: Any) -> OrthoRankConfig:
    """``plan`` with ``changes``, and without a way to select beside them."""
    return dataclasses.replace(plan, select="topk", select_window=None, thresholds={}, **changes)
