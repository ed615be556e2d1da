"""One layer at a time: does selecting by one criterion hurt less than by another? (paper, section 3.1, Figure 4)"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.common.paired import paired
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.layers import LayerStack

OnLayer = Callable[[int, int, "LayerComparison"], None]


@dataclass(frozen=True)
class LayerComparison:
    """One layer alone selecting, by two criteria.

    Args:
        layer: its number.
        losses: mean loss in nats of each window under the first criterion; other_losses: under the second.
    """

    layer: int
    losses: tuple[float, ...]
    other_losses: tuple[float, ...]

    @property
    def perplexities(self) -> tuple[float, float]:
        """Under the first and the second criterion."""
        return math.exp(statistics.fmean(self.losses)), math.exp(statistics.fmean(self.other_losses))

    @property
    def difference(self) -> float:
        """Perplexity under the first minus under the second: negative where the first is better (Figure 4)."""
        first, second = self.perplexities
        return first - second

    @property
    def margin(self) -> float:
        """Mean over windows of the second loss minus the first, in nats: positive where the first is better."""
        return paired(self.losses, self.other_losses)[0]

    @property
    def standard_error(self) -> float:
        """Of the margin, from the spread between windows (paired); NaN for a single window."""
        return paired(self.losses, self.other_losses)[1]

    def to_dict(self) -> dict[str, Any]:
        """Losses and the figures drawn from them, as JSON stores them."""
        return dataclasses.asdict(self) | {
            "perplexities": self.perplexities,
            "difference": self.difference,
            "margin": self.margin,
            "standard_error": self.standard_error,
        }


def compare_layers(
    stack: LayerStack,
    input_ids: Tensor,
    layers: Iterable[int],
    *,
    keep_ratio: float = 1 / 3,
    criteria: tuple[str, str] = ("orthogonal", "inverse"),
    on_layer: OnLayer | None = None,
) -> list[LayerComparison]:
    """The loss with each of ``layers`` alone selecting, by both criteria.

    Args:
        stack: the model, layer by layer. input_ids: int64 ``[windows, tokens]``.
        layers: which ones, counted from 0. keep_ratio: share of the tokens that the layer updates.
        criteria: two of `OrthoRankConfig`'s. on_layer: called after each as ``on_layer(done, total, comparison)``.

    Raises:
        OrthoRankError: no layers, or one that the model does not have.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> stack = LayerStack(LlamaForCausalLM(config).eval())
        >>> found = compare_layers(stack, torch.arange(32).view(2, 16), [1, 2])
        >>> [one.layer for one in found], len(found[0].losses)
        ([1, 2], 2)
    """
    asked = sorted(set(layers))
    if not asked:
        raise OrthoRankError("layers is empty; give at least one layer to compare")
    # one evaluator for each window and criterion: the losses of the windows are wanted one by one
    evaluators = [
        [Evaluator(stack, window, keep_ratio=keep_ratio, criterion=criterion) for window in input_ids.split(1)]
        for criterion in criteria
    ]
    for evaluator in (one for several in evaluators for one in several):
        evaluator.start([], layers=asked)
    found = []
    for number, layer in enumerate(asked, 1):
        losses = [tuple(evaluator.loss([layer]) for evaluator in several) for several in evaluators]
        found.append(LayerComparison(layer, *losses))
        if on_layer is not None:
            on_layer(number, len(asked), found[-1])
    return found
