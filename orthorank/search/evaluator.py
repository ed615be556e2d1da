"""The calibration loss of a plan with one more layer switched, without computing again what did not change.

Switching layer c leaves the states below c as they are. So the states at the input of one layer, the front, are kept;
asking for candidate c moves the front up to c through the layers in between, once, and the candidate costs c and the
layers above it. Asked in ascending order, a whole round costs one pass through the candidates' range on top. Below the
lowest candidate nothing ever changes: that state, the base, is computed once for the whole search. Two states are all
that is held, ``2 * windows * tokens * hidden`` values, whatever the number of layers.
"""

import hashlib
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from orthorank.errors import OrthoRankError
from orthorank.families import device_of

if TYPE_CHECKING:
    from orthorank.stack import LayerStack, Pass


class Evaluator:
    """Mean token loss on calibration windows, for plans that differ by one layer from the current one.

    Args:
        stack: the model, layer by layer.
        input_ids: int64 ``[windows, tokens]``, at least 2 tokens.
        keep_ratio: of a switched layer; 0 removes it (SLEB, Shortened LLaMA).
        criterion: ``"orthogonal"`` or ``"inverse"``.
        batch_size: windows that run together. The loss depends on it by rounding only.

    Raises:
        OrthoRankError: an argument out of range.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> evaluator = Evaluator(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None], keep_ratio=0.5)
        >>> evaluator.start(plan=[], lowest=1)
        >>> abs(evaluator.loss(1) - evaluator.loss(2)) < 1.0
        True
    """

    def __init__(
        self,
        stack: "LayerStack",
        input_ids: Tensor,
        *,
        keep_ratio: float = 1 / 3,
        criterion: str = "orthogonal",
        batch_size: int = 1,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
            raise OrthoRankError(
                f"input_ids has shape {list(input_ids.shape)}; it must be [windows, tokens] with at least one window "
                "of 2 tokens"
            )
        if not 0 <= keep_ratio < 1:
            raise OrthoRankError(f"keep_ratio is {keep_ratio}; it must be from 0 (layer removed) to below 1")
        if batch_size < 1:
            raise OrthoRankError(f"batch_size is {batch_size}; it must be at least 1")
        self.stack = stack
        self.input_ids = input_ids.to(device_of(stack.model))
        self.keep_ratio = keep_ratio
        self.criterion = criterion
        self._ids = self.input_ids.split(batch_size)
        self._inputs: list[Pass] = []
        self._base: tuple[int, list[Tensor]] = (-1, [])  # a layer and its input, for each batch of windows
        self._front = self._base
        self._plan: frozenset[int] = frozenset()

    @property
    def predictions(self) -> int:
        """Tokens whose loss is averaged."""
        return self.input_ids.shape[0] * (self.input_ids.shape[1] - 1)

    @property
    def fingerprint(self) -> str:
        """What the losses depend on beside the model: a hash of the windows, the keep ratio and the criterion."""
        text = f"{list(self.input_ids.shape)} {self.input_ids.flatten().tolist()} {self.keep_ratio!r} {self.criterion}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start(self, plan: Iterable[int], lowest: int) -> None:
        """Set the current plan; no layer below ``lowest`` will be asked for, and none of the plan is below it."""
        self._plan = frozenset(plan)
        if outside := [layer for layer in (*self._plan, lowest) if not lowest <= layer < self.stack.num_layers]:
            raise OrthoRankError(f"layer {outside[0]} is not from {lowest} to {self.stack.num_layers - 1}")
        if not self._inputs:
            self._inputs = [self.stack.embed(ids) for ids in self._ids]
        if self._base[0] != lowest:
            states = [inputs.hidden_states for inputs in self._inputs]
            self._base = (lowest, self._run(states, 0, lowest))
        self._front = self._base

    def loss(self, candidate: int | None, limit: float = math.inf) -> float:
        """Mean loss in nats of the current plan with ``candidate`` switched as well; None: of the plan itself.

        The candidate is given up when the losses seen so far already make its mean larger than ``limit``. That is
        exact: a token's loss is never negative, so the rest can only add to it.

        Returns:
            The loss, or ``math.inf`` for a candidate that was given up (its loss is above ``limit``).
        """
        if not self._inputs:
            raise OrthoRankError("no plan is set; call start(plan, lowest) first")
        at = self._base[0] if candidate is None else candidate
        if not self._base[0] <= at < self.stack.num_layers or candidate in self._plan:
            free = f"from {self._base[0]} to {self.stack.num_layers - 1} and not in the plan"
            raise OrthoRankError(f"candidate is {candidate}; it must be {free}")
        self._move_front(at)
        total = 0.0
        for index, states in enumerate(self._front[1]):
            hidden = states
            for layer in range(at, self.stack.num_layers):
                hidden = self._layer(index, layer, hidden, switched=layer == candidate)
            total += self.stack.token_losses(hidden, self._ids[index]).double().sum().item()
            if total / self.predictions > limit:  # the same division as below: never above the final value
                return math.inf
        mean = total / self.predictions
        return mean if math.isfinite(mean) else math.inf  # a plan that gives NaN is never the best one

    def _move_front(self, layer: int) -> None:
        if layer < self._front[0]:
            self._front = self._base
        at, states = self._front
        self._front = (layer, self._run(states, at, layer))

    def _run(self, states: list[Tensor], begin: int, end: int) -> list[Tensor]:
        """Each batch's states from the input of layer ``begin`` to that of layer ``end``, by the current plan."""
        moved = []
        for index, hidden in enumerate(states):
            for layer in range(begin, end):
                hidden = self._layer(index, layer, hidden)
            moved.append(hidden)
        return moved

    def _layer(self, batch: int, layer: int, hidden: Tensor, switched: bool = False) -> Tensor:
        ratio = self.keep_ratio if switched or layer in self._plan else 1.0
        return self.stack.run(layer, hidden, self._inputs[batch], keep_ratio=ratio, criterion=self.criterion)
