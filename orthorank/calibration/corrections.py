"""The maps of a corrected plan, in closed form: on a text, from the lowest layer to the highest, without training.

Each layer is fitted on the states that the corrected layers below it leave. A map is a ridge regression of what is
missing from a left-out token on the token's normed state, of which the leading directions of its outputs are kept.
Only sums over tokens are needed (``X'X`` and ``X'Y``), so what is fitted on may be as long as one likes; the states of
all windows are kept meanwhile, in host memory, twice where the dense model's are the target.
"""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from orthorank.calibration.fitting import Fitted, FitWindows, held_out
from orthorank.calibration.progress import FitProgress, identity_of
from orthorank.calibration.spilled import spilled
from orthorank.calibration.windows import check_windows, record_of
from orthorank.common.errors import OrthoRankError, check_choice, check_integer
from orthorank.config import OrthoRankConfig
from orthorank.correction import Correction
from orthorank.hf.apply import check_plan
from orthorank.hf.provenance import provenance
from orthorank.stack.layers import LayerStack
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OnLayer = Callable[[int, int, float | None], None]
TARGETS = ("dense", "layer")


def fit_correction(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: OrthoRankConfig,
    *,
    rank: int = 64,
    target: str = "dense",
    batch_size: int | None = None,
    on_layer: OnLayer | None = None,
    save_to: Path | None = None,
    spill: Path | None = None,
) -> OrthoRankConfig:
    """``plan`` with a map for each of its layers that leaves tokens out, fitted to ``input_ids``.

    What a map has learnt is the text it was fitted on: give windows of every kind of text that is to come, in equal
    shares. For a model of 576 channels 16,384 tokens were worth 0.06 to 0.09 nats more than 4,096
    (docs/correction-results.md); more channels want more.

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
        save_to: a file that gets each layer's map as soon as it is fitted. One that is there is gone on with: its maps
            are applied, not fitted again, and the result is the same, bit for bit. The caller deletes it.
        spill: a folder for the states of the windows, in files of their own that are deleted at the end; None: they
            are held in memory.

    Returns:
        A new plan. ``calibration["correction"]`` says what the maps were fitted on, and for each layer the share of
        what is missing that the map explains on held-out windows, ``1 - |y - map(x)|² / |y|²``.

    Raises:
        OrthoRankError: the plan leaves nothing out or is another model's, the model is in training mode, an argument is
            out of range, or ``save_to`` is of another fit.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.arange(240).view(8, 30) % 64
        >>> found = fit_correction(model, ids, OrthoRankConfig(layers=[1, 2], keep_ratios={2: 0.0}), rank=4)
        >>> found.correction, sorted(found.calibration["correction"]["explained"])
        (Correction(rank=4, layers=[1, 2]), ['1', '2'])
    """
    check_fit(model, input_ids, plan, rank, target)
    fits: dict[int, Fitted] = {}
    for layer, total, fitted in fit_layers(
        model,
        input_ids,
        plan,
        rank=rank,
        target=target,
        thresholds=plan.select == "threshold",
        batch_size=batch_size,
        save_to=save_to,
        spill=spill,
    ):
        if fitted is not None:
            fits[layer] = fitted
        if on_layer is not None:
            on_layer(layer + 1, total, None if fitted is None else fitted.explained)
    return corrected_plan(model, input_ids, plan, fits, rank, target)


def check_fit(model: "PreTrainedModel", input_ids: Tensor, plan: OrthoRankConfig, rank: int, target: str) -> None:
    """Raises as `fit_correction` does, before anything is computed."""
    check_plan(model, plan)
    check_windows(model, input_ids, least=2)
    check_choice("target", target, TARGETS)
    check_integer("rank", rank, 1, model.config.get_text_config().hidden_size)
    if not any(ratio < 1 for ratio in plan.ratios.values()):
        raise OrthoRankError(
            f"the plan leaves no token out (layers {plan.layers}, keep_ratio {plan.keep_ratio:g}); a correction is for "
            "layers whose ratio is below 1"
        )


def fit_layers(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: OrthoRankConfig,
    *,
    rank: int,
    target: str,
    thresholds: bool,
    batch_size: int | None = None,
    save_to: Path | None = None,
    spill: Path | None = None,
    fit_windows: type[FitWindows] = FitWindows,
) -> Iterator[tuple[int, int, Fitted | None]]:
    """Walk up to the last layer that leaves tokens out: each layer, how many there are, and its fit, None if dense.

    Arguments as for `fit_correction`; thresholds: whether each layer's is found before its map; fit_windows: what fits.
    """
    identity = identity_of(model, input_ids, plan, rank=rank, target=target, thresholds=thresholds)
    progress = FitProgress(identity) if save_to is None else FitProgress.of(save_to, identity, batch_size)
    size = progress.batch_size if batch_size is None else batch_size
    windows = fit_windows(LayerStack(model), input_ids, plan, thresholds=thresholds, batch_size=size)
    progress.batch_size = windows.batch_size
    total = 1 + max(layer for layer, ratio in plan.ratios.items() if ratio < 1)
    with spilled(spill) as keep:
        states = [keep("state", i, h) for i, h in enumerate(windows.embedded())]
        targets: list[Tensor] | None = None  # the dense model's states, once they are others
        for layer in range(total):
            ratio = plan.ratio(layer)
            if ratio == 1:
                states = [keep("state", i, h) for i, h in enumerate(windows.dense(layer, states))]
            if target == "dense" and (ratio < 1 or targets is not None):
                from_states = states if targets is None else targets
                targets = [keep("target", i, h) for i, h in enumerate(windows.dense(layer, from_states))]
            fitted = None
            if ratio < 1:
                fitted = progress.fits.get(layer)
                if fitted is None:
                    fitted = windows.fit(layer, ratio, rank, states, targets or windows.dense(layer, states))
                    progress.add(layer, fitted)
                else:
                    windows.follow(layer, ratio, fitted, states)
            yield layer, total, fitted


def corrected_plan(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: OrthoRankConfig,
    fits: dict[int, Fitted],
    rank: int,
    target: str,
    **changes: Any,
) -> OrthoRankConfig:
    """``plan`` with the maps and thresholds of ``fits``, what they were fitted on, and ``changes``."""
    windows = len(input_ids)
    record = record_of(input_ids) | {
        "rank": rank,
        "target": target,
        "tokens": input_ids.numel(),
        "held_out_windows": int(held_out(windows).sum()),
        **provenance(model),
        "ridge": {str(layer): fitted.ridge for layer, fitted in fits.items()},
        "explained": {str(layer): round(fitted.explained, 4) for layer, fitted in fits.items()},
    }
    records: dict[str, Any] = {"correction": record}
    thresholds = {layer: fitted.threshold for layer, fitted in fits.items() if fitted.threshold is not None}
    if thresholds:
        achieved = {str(layer): round(fits[layer].achieved or 0.0, 6) for layer in thresholds}
        records["thresholds"] = record_of(input_ids) | {"achieved": achieved}
    return dataclasses.replace(
        plan,
        correction=Correction({layer: fitted.layer_map for layer, fitted in fits.items()}),
        thresholds=thresholds,
        calibration=plan.calibration | records,
        measured={},  # figures of the plan without maps
        version=__version__,
        **changes,
    )
