"""The losses of plans with maps on some texts; what the dense layers below all of them leave is computed once."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from benchmarks.correction.fits import run_both
from orthorank import OrthoRankConfig
from orthorank.calibration.fitting import SELECTED_BY
from orthorank.calibration.threshold import RANKED_BY
from orthorank.correction import LayerMap
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.layers import LayerStack

BATCH = 2  # windows in one forward


class TextLosses:
    """Mean token losses of plans, window by window.

    Args:
        stack: the model, layer by layer.
        texts: by name, int64 ``[windows, tokens]``.
        first: the lowest layer that any plan changes; the states that enter it are held.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> losses = TextLosses(LayerStack(LlamaForCausalLM(config).eval()), {"a": torch.arange(96).view(3, 32)}, 1)
        >>> [len(values) for values in losses.of(OrthoRankConfig(layers=[2], keep_ratio=0)).values()]
        [3]
    """

    def __init__(self, stack: LayerStack, texts: Mapping[str, Tensor], first: int) -> None:
        self.first = first
        self.evaluators = {name: _Given(stack, ids, batch_size=BATCH) for name, ids in texts.items()}
        for evaluator in self.evaluators.values():
            evaluator.start({}, [first])

    def of(self, plan: OrthoRankConfig | None, also: Mapping[int, LayerMap] | None = None) -> dict[str, list[float]]:
        """Nats a token of each window of each text; None: of the dense model.

        Args:
            also: maps for the tokens that a layer selects, by layer.

        Raises:
            ValueError: the plan changes a layer below the first.
        """
        ratios = {layer: plan.ratio(layer) for layer in plan.layers} if plan else {}
        if min(ratios, default=self.first) < self.first:
            raise ValueError(f"the plan changes layer {min(ratios)}; the states held are those before {self.first}")
        found = {}
        for name, evaluator in self.evaluators.items():
            evaluator.maps = dict(plan.correction.maps) if plan and plan.correction else {}
            evaluator.also = dict(also or {})
            evaluator.options = {field: getattr(plan, field) for field in (*RANKED_BY, *SELECTED_BY)} if plan else {}
            evaluator.criterion = str(evaluator.options.pop("criterion", "orthogonal"))
            sums = evaluator.window_losses(ratios, range(evaluator.windows))
            assert sums is not None  # no limit was given
            found[name] = [total / (evaluator.input_ids.shape[1] - 1) for total in sums]
        return found


class _Given(Evaluator):
    """An evaluator of plans whose maps are given."""

    maps: dict[int, LayerMap]
    also: dict[int, LayerMap]

    def _run(self, ratios: Any, layer: int, hidden: Tensor, inputs: Any) -> Tensor:
        given = {"criterion": self.criterion, "layer_map": self.maps.get(layer), **self.options}
        return run_both(self.stack, layer, hidden, inputs, ratios[layer], self.also.get(layer), **given)
