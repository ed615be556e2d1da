"""The calibration loss as a budget search asks for it, with an estimate from a part of the windows."""

import math
from typing import TYPE_CHECKING, Any

from contrib.budget.plans import Plan

if TYPE_CHECKING:
    from orthorank.stack.evaluator import Evaluator

SCOUTED = 0.25  # share of the windows that an estimate sees


class CalibrationLoss:
    """The losses of `contrib.budget.budget.budget_search`, by an `Evaluator`.

    Args:
        evaluator: of the calibration windows; plans state every ratio, so its own keep ratio does not matter.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.search import Evaluator
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> stack = LayerStack(LlamaForCausalLM(config).eval())
        >>> losses = CalibrationLoss(Evaluator(stack, torch.arange(64).view(8, 8), batch_size=1))
        >>> losses.scout_windows, losses.loss({2: 0.0}) < 6
        (2, True)
    """

    def __init__(self, evaluator: "Evaluator") -> None:
        self.evaluator = evaluator
        batch, windows = evaluator.batch_size, evaluator.windows
        self.scout_windows = min(windows, math.ceil(windows * SCOUTED / batch) * batch)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Windows and options, how many windows run together (the last bits depend on it), how many are scouted."""
        return {
            "windows": self.evaluator.fingerprint,
            "batch_size": self.evaluator.batch_size,
            "scouted": self.scout_windows,
        }

    def loss(self, plan: Plan, limit: float = math.inf) -> float:
        """Mean loss over all windows in nats; inf if it is not finite, and where it is above ``limit`` it may be."""
        return self.evaluator.loss(plan, limit)

    def scout(self, plan: Plan) -> float:
        """Mean loss over the first ``scout_windows`` windows; inf when it is not finite."""
        sums = self.evaluator.window_losses(plan, range(self.scout_windows))
        tokens = self.evaluator.predictions // self.evaluator.windows
        return math.inf if sums is None else sum(sums) / (self.scout_windows * tokens)

    def follow(self, plan: Plan) -> None:
        """Keep the states of ``plan``: the next plans have much in common with it."""
        self.evaluator.start(plan)
