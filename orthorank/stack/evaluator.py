"""The calibration loss of any plan, without computing again what did not change.

Switching layer c leaves the states below c as they are, so a plan is run from the highest layer up to which its states
are known (`orthorank.stack.resources.States`), and it is given up as soon as its loss is known to be too large. Both
are exact: the windows that run together are the same for every plan, and so is every bit of a loss.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError, check_integers, check_share
from orthorank.families.known import device_of
from orthorank.stack.resources import OneProcess, Processes, Ratios, States, check_bytes, states_budget, windows_at_once

if TYPE_CHECKING:
    from orthorank.stack.layers import LayerStack, Pass

Plan = Mapping[int, float] | Iterable[int]

# A sum of n numbers in double precision is off by n * 1e-16 of itself at most. What exceeds a limit by more than this,
# summed in any order, is above it.
_SLACK = 1 + 1e-9


class Evaluator:
    """Mean token loss on calibration windows of plans that have much in common.

    Args:
        stack: the model, layer by layer.
        input_ids: int64 ``[windows, tokens]``, at least 2 tokens.
        keep_ratio: of the layers of a plan that is given as a list; 0 removes them (SLEB, Shortened LLaMA).
        criterion: how switched layers rank tokens, see `OrthoRankConfig`.
        options: further fields of `OrthoRankConfig` that switched layers follow, such as ``{"seed": 1}``.
        batch_size: windows that run together; None: by the free memory, at most a quarter of the windows. The loss
            depends on it by rounding only.
        memory: bytes of hidden states that are kept; None: a quarter of the free memory. States that do not fit are
            computed again. One state takes ``windows * tokens * hidden`` values; two of them, the input of the lowest
            candidate layer and that of the layer in question, are enough for the main part of what can be saved.
        processes: a group of processes with the same arguments, which share the windows among them.

    Raises:
        OrthoRankError: an argument out of range.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> evaluator = Evaluator(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None], keep_ratio=0.5)
        >>> evaluator.loss([1]) == evaluator.loss({1: 0.5})
        True
        >>> abs(evaluator.loss({1: 0.5, 2: 0}) - evaluator.loss([])) < 1.0
        True
    """

    def __init__(
        self,
        stack: "LayerStack",
        input_ids: Tensor,
        *,
        keep_ratio: float = 1 / 3,
        criterion: str = "orthogonal",
        options: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        memory: int | None = None,
        processes: Processes | None = None,
    ) -> None:
        if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
            raise OrthoRankError(
                f"input_ids has shape {list(input_ids.shape)}; it must be [windows, tokens] with at least one window "
                "of 2 tokens"
            )
        check_share("keep_ratio", keep_ratio, "0 for a removed layer", zero=True)
        check_integers({"batch_size": batch_size}, batch_size=1)
        check_bytes("memory", memory)
        self.stack = stack
        self.device = device_of(stack.model)
        self.input_ids = input_ids.to(self.device)
        self.keep_ratio = keep_ratio
        self.criterion = criterion
        self.options = dict(options or {})
        self.processes = OneProcess() if processes is None else processes
        self.memory = states_budget(self.device) if memory is None else memory
        self.chosen_batch_size = batch_size is not None
        self.batch_size = self._agreed_batch_size() if batch_size is None else batch_size
        self.start([])

    @property
    def predictions(self) -> int:
        """Tokens whose loss is averaged."""
        return self.input_ids.shape[0] * (self.input_ids.shape[1] - 1)

    @property
    def windows(self) -> int:
        """Calibration windows."""
        return self.input_ids.shape[0]

    @cached_property
    def fingerprint(self) -> str:
        """What the losses depend on beside the model: a hash of windows, keep ratio, criterion and options."""
        text = f"{list(self.input_ids.shape)} {self.input_ids.flatten().tolist()} {self.keep_ratio!r} {self.criterion}"
        text += f" {sorted(self.options.items())}" if self.options else ""
        text += "".join(code_of(self.criterion).values())
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start(self, plan: Plan, layers: Iterable[int] | None = None) -> None:
        """Set the plan that the next ones differ from by little: states are kept for its sake.

        Args:
            plan: as for `loss`.
            layers: those that the next plans change; states are kept at their inputs. None: at every layer.
        """
        ratios = self._ratios(plan)
        asked = range(self.stack.num_layers) if layers is None else sorted(set(layers))
        if wrong := [layer for layer in asked if not 0 <= layer < self.stack.num_layers]:
            raise OrthoRankError(f"layers holds {wrong[0]}; the model has layers 0 to {self.stack.num_layers - 1}")
        self._kept_at = frozenset(asked)
        for batch in self._batches.values():
            batch.states.follow(ratios, min(asked, default=0))

    def loss(self, plan: Plan, limit: float = math.inf) -> float:
        """Mean loss of ``plan`` in nats, over all windows and all processes.

        The plan is given up once the losses seen so far make its mean larger than ``limit`` whatever the rest is: a
        token's loss is never negative.

        Args:
            plan: the ratio of each layer that is not dense (``{12: 1/3, 14: 0.0}``), or the layers that have the
                evaluator's own keep ratio.

        Returns:
            The loss; ``math.inf`` for a plan that was given up, whose loss is above ``limit``, or if it is not finite.
        """
        sums = self.window_losses(plan, range(self.windows), limit * self.predictions)
        mean = math.inf if sums is None else sum(sums) / self.predictions
        return mean if math.isfinite(mean) else math.inf  # NaN is never the best

    def window_losses(self, plan: Plan, windows: range, most: float = math.inf) -> list[float] | None:
        """Summed token losses of some windows by ``plan``, in nats, each window's own.

        Args:
            plan: as for `loss`.
            windows: consecutive windows that begin and end where batches do: at multiples of ``batch_size``, or at the
                last window.
            most: what the sums may add up to.

        Returns:
            The sums, or None when they were known to add up to more than ``most`` before all were computed.
        """
        ends = (windows.start, windows.stop % self.windows)  # the last window ends a batch, too
        if not 0 <= windows.start < windows.stop <= self.windows or any(end % self.batch_size for end in ends):
            raise OrthoRankError(
                f"windows is {windows}; it must begin and end at multiples of the batch size, {self.batch_size}, or at "
                f"the last of the {self.windows} windows"
            )
        ratios = self._ratios(plan)
        ids = range(windows.start // self.batch_size, -(-windows.stop // self.batch_size))
        own = [batch for batch in ids if batch % self.processes.size == self.processes.rank]
        gathered = self.processes.gather(self._own_losses(own, ratios, most))
        if any(math.isinf(value) for values in gathered for value in values):
            return None
        sums: list[float] = []
        rest = [iter(values) for values in gathered]
        for batch in ids:  # back in the order of the windows, so that their sum has the bits of one process
            sums += [next(rest[batch % self.processes.size]) for _ in range(self._windows_in(batch))]
        return sums

    def go_on_with(self, batch_size: int | None) -> None:
        """Take the batch size of an earlier search that is continued, if it is known.

        Raises:
            OrthoRankError: another one was asked for.
        """
        if batch_size in (None, self.batch_size):
            return
        if self.chosen_batch_size:
            raise OrthoRankError(
                f"state is of a search with {batch_size} windows in a batch and the evaluator has {self.batch_size}; "
                f"losses depend on it by rounding: pass batch_size={batch_size}, or None"
            )
        assert batch_size is not None
        self.use_batch_size(batch_size)

    def use_batch_size(self, batch_size: int) -> None:
        """Change how many windows run together, as a search that goes on must; what is kept is dropped."""
        self.batch_size = batch_size
        self.__dict__.pop("_batches", None)
        self.start([])

    @cached_property
    def _batches(self) -> dict[int, "_Batch"]:
        """The batches of windows that this process runs, by number."""
        parts = dict(enumerate(self.input_ids.split(self.batch_size)))
        own = {at: ids for at, ids in parts.items() if at % self.processes.size == self.processes.rank}
        return {at: _Batch(self.stack, ids, States(self.memory / len(own))) for at, ids in own.items()}

    def _own_losses(self, batches: list[int], ratios: Ratios, most: float) -> list[float]:
        """The sums of the windows in ``batches``, or an infinite one when they are not worth computing any more."""
        sums: list[float] = []
        left = sum(map(self._windows_in, batches)) * (self.input_ids.shape[1] - 1)  # tokens
        for number in batches:
            batch = self._batches[number]
            hidden = self._top(batch, ratios)
            losses = []
            seen = sum(sums)
            for part in self.stack.loss_parts(hidden, batch.input_ids):
                losses.append(part.double())
                left -= len(part)
                if left and math.isfinite(most):  # all of a loss that is complete is worth knowing
                    seen += losses[-1].sum().item()
                    if seen > most * _SLACK:
                        return [math.inf]
            sums += _by_window(losses, len(batch.input_ids))
        return sums

    def _top(self, batch: "_Batch", ratios: Ratios) -> Tensor:
        """The output of the last layer, from the highest layer up to which the states are known."""
        layer, hidden = batch.states.longest(ratios) or (0, batch.embedded())
        while layer < len(ratios):
            hidden = self._run(ratios, layer, hidden, batch.inputs)
            layer += 1
            if self._is_kept(ratios[:layer]):
                batch.states.offer(ratios[:layer], hidden)
        return hidden

    def _run(self, ratios: Ratios, layer: int, hidden: Tensor, inputs: "Pass") -> Tensor:
        """One layer of the plan with ``ratios``."""
        return self.stack.run(layer, hidden, inputs, ratios[layer], self.criterion, **self.options)

    def _is_kept(self, prefix: Ratios) -> bool:
        """Whether the state that layers with these ratios leave may be of use to another plan."""
        return len(prefix) in self._kept_at

    def _ratios(self, plan: Plan) -> Ratios:
        given = plan if isinstance(plan, Mapping) else dict.fromkeys(plan, self.keep_ratio)
        for layer, ratio in given.items():
            if not 0 <= layer < self.stack.num_layers:
                raise OrthoRankError(f"plan holds layer {layer}; the model has layers 0 to {self.stack.num_layers - 1}")
            if not 0 <= ratio <= 1:
                raise OrthoRankError(f"plan gives layer {layer} the ratio {ratio}; it must be from 0 to 1")
        return tuple(float(given.get(layer, 1.0)) for layer in range(self.stack.num_layers))

    def _windows_in(self, batch: int) -> int:
        return min(self.batch_size, self.windows - batch * self.batch_size)

    def _agreed_batch_size(self) -> int:
        model = self.stack.model
        windows, tokens = self.input_ids.shape
        own = windows_at_once(model.config, windows, tokens, self.device, model.dtype.itemsize)
        return int(min(min(values) for values in self.processes.gather([float(own)])))


class _Batch:
    """Windows that run together: their ids, what the model hands to its layers, and the states that are kept."""

    def __init__(self, stack: "LayerStack", input_ids: Tensor, states: States) -> None:
        self.stack, self.input_ids, self.states = stack, input_ids, states

    @cached_property
    def inputs(self) -> "Pass":
        """What the layers get beside the states. The embedded windows are not held: they are quick to get."""
        given = self.stack.embed(self.input_ids)
        return dataclasses.replace(given, hidden_states=given.hidden_states.new_empty(0))

    def embedded(self) -> Tensor:
        """The input of layer 0."""
        return self.stack.embed(self.input_ids).hidden_states


def _by_window(losses: list[Tensor], windows: int) -> list[float]:
    """Sums of the tokens of each window, from slices of ``[windows * (tokens - 1)]`` losses."""
    return torch.cat(losses).view(windows, -1).sum(1).tolist()
