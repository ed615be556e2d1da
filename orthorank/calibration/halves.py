"""The two halves of a text: what is fitted to windows of the first is measured on windows of the second."""

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from orthorank.calibration import corrections
from orthorank.calibration.windows import record_of
from orthorank.common.errors import OrthoRankError
from orthorank.common.progress import Screen
from orthorank.common.texts import Bos, Samples, Text, read_tokens, take_samples
from orthorank.config import OrthoRankConfig
from orthorank.evaluation.perplexity import perplexity
from orthorank.hf.apply import apply
from orthorank.hf.provenance import differing, weights_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FOLLOWED = (  # of a plan, what its maps leave as it is
    *("ratios", "criterion", "seed", "select", "select_window", "keep_multiple", "keep_last"),
    *("min_prompt", "decode", "kv", "update_sink", "sinks"),
)


def halves_of(
    source: Text,
    tokenizer: "PreTrainedTokenizerBase",
    model: "PreTrainedModel",
    where: Bos,
    *,
    windows: int,
    window: int,
    longest: int,
) -> Samples:
    """``windows`` windows of each half of a text, read by the model's tokenizer: to fit on, and to measure on.

    Args:
        where: where BOS stands; longest: tokens of the model's longest input.

    Raises:
        OrthoRankError: ``window`` is more than that, or the text is too short.
    """
    if window > longest:
        raise OrthoRankError(f"window is {window}; the model's longest input has {longest} tokens")
    return take_samples(
        read_tokens(source, tokenizer, model, where),
        windows=windows,
        window=window,
        held_out_windows=windows,
        held_out_len=window,
        name=f"the text ({source.name})",
        leading=where.leading,
    )


def fit_maps(
    screen: Screen, title: str, model: "PreTrainedModel", ids: Tensor, plan: OrthoRankConfig, **how: Any
) -> OrthoRankConfig:
    """`orthorank.calibration.fit_correction` with a bar called ``title``, which says what each layer's map explains."""
    last = max((layer for layer, ratio in plan.ratios.items() if ratio < 1), default=0)
    with screen.progress(title, last + 1) as advance:

        def on_layer(done: int, _: int, explained: float | None) -> None:
            advance(done, "" if explained is None else f"explains {explained:.0%}")

        return corrections.fit_correction(model, ids, plan, on_layer=on_layer, **how)


def is_of(
    done: OrthoRankConfig, model: "PreTrainedModel", ids: Tensor, plan: OrthoRankConfig, distill: int, **how: Any
) -> bool:
    """Whether ``done`` is the plan that a fit of maps to the windows ``ids``, by ``how``, would end with."""
    record = done.calibration.get("correction")
    if not isinstance(record, dict) or any(record.get(name) != value for name, value in (record_of(ids) | how).items()):
        return False
    apart = differing(record.get("model_fingerprint"), weights_fingerprint(model))
    steps = record["distilled"]["steps"] if "distilled" in record else 0
    same = all(getattr(done, name) == getattr(plan, name) for name in FOLLOWED)
    return same and steps == distill and apart is not None and apart[0] == 0


def corrected_losses(
    screen: Screen,
    model: "PreTrainedModel",
    before: OrthoRankConfig,
    after: OrthoRankConfig,
    held_out: Sequence[Tensor],
) -> list[dict[str, float]]:
    """The loss on each text's windows, in nats a token: dense, with the plan as it was, and corrected."""
    plans = {"dense": None, "plan": dataclasses.replace(before, correction=None), "corrected": after}
    losses: list[dict[str, float]] = [{} for _ in held_out]
    with screen.progress("second halves of the texts", len(plans) * len(held_out)) as advance:
        for number, (name, plan) in enumerate(plans.items()):
            with nullcontext() if plan is None else apply(model, plan):
                for i, windows in enumerate(held_out):
                    losses[i][name] = round(perplexity(model, windows).loss, 4)
                    advance(number * len(held_out) + i + 1, name)
    return losses


def selected_shares(
    screen: Screen, model: "PreTrainedModel", plan: OrthoRankConfig, held_out: Tensor
) -> dict[int, float]:
    """The share of the tokens of ``held_out`` that each layer updates by its threshold; noted in ``plan.measured``."""
    with apply(model, plan) as handle, screen.progress("second half of the text", len(held_out)) as advance:
        result = perplexity(model, held_out, on_window=lambda done, _, value: advance(done, f"perplexity {value:.2f}"))
        achieved = {layer: handle.stats[layer].achieved_ratio or 0.0 for layer in plan.selecting}
    plan.measured = {
        "perplexity": result.perplexity,
        "seq_len": result.window,
        "windows": result.windows,
        "text": "second half of the calibration text",
        "achieved": {str(layer): round(share, 6) for layer, share in achieved.items()},
    }
    return achieved
