"""One layer's threshold, from the ranks of all calibration tokens."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.stack.layers import LayerStack, Pass
from orthorank_kernels import keep_count

RANKED_BY = ("criterion", "seed", "kv", "update_sink", "sinks")  # fields of a plan that its thresholds depend on


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


def find_threshold(
    stack: LayerStack, layer: int, states: Sequence[Tensor], passes: Sequence[Pass], plan: OrthoRankConfig, ids: Tensor
) -> tuple[float, float]:
    """The threshold of ``layer``, and the share of the tokens ``ids`` that it updates.

    Args:
        states: at the layer's input, batch by batch; passes: what else layers are handed.
    """
    ranked: dict[str, Any] = {name: getattr(plan, name) for name in RANKED_BY}
    pairs = zip(states, passes, strict=True)
    ranks = torch.cat([stack.ranks(layer, h, inputs, **ranked)[:, 1:].flatten().cpu() for h, inputs in pairs])
    total, sinks = ids.numel(), ids.shape[0] if plan.update_sink else 0
    count = keep_count(total, plan.ratio(layer)) - sinks
    if not 0 < count < len(ranks):
        raise OrthoRankError(
            f"layer {layer} is to update {plan.ratio(layer):.4g} of {total} calibration tokens, of which {len(ranks)} "
            f"are no sinks: {count} below a threshold. There must be at least one on either side: calibrate on more "
            "windows, or change keep_ratio"
        )
    threshold, below = threshold_for(ranks, count)
    return threshold, (below + sinks) / total
