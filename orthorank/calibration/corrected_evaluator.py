"""The calibration loss of corrected plans, each with maps of its own, so that layers are searched with them on."""

import hashlib
from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calibration.fitting import Fitted, FitWindows
from orthorank.calibration.windows import check_windows
from orthorank.common.errors import check_integer
from orthorank.config import OrthoRankConfig
from orthorank.stack.evaluator import Evaluator, Plan
from orthorank.stack.resources import Ratios, States, check_bytes, states_budget

if TYPE_CHECKING:
    from orthorank.stack.layers import LayerStack, Pass


class CorrectedEvaluator(Evaluator):
    """Mean token loss on calibration windows of plans whose layers have maps, fitted on other windows.

    The target of every map is the dense model's state. A layer's map depends on the layers below it alone, as states
    do, so both are kept while plans that share them are asked for.

    Args:
        stack, input_ids: as for `Evaluator`; the loss is that of ``input_ids``.
        fit_ids: int64 ``[windows, tokens]``, 2 windows or more: what the maps are fitted on. Their dense states, at the
            input of each layer, are held in host memory.
        rank: of the maps.
        refit: whether the maps above a layer that is switched are fitted again, as they are in the plan that comes of
            it. False: those of the plan given to `start` are kept, which is quicker and gives a loss that is a little
            larger.
        memory: bytes of states of ``input_ids`` that are kept, and as many of the other states of ``fit_ids``.
        options: as for `Evaluator`.

    Raises:
        OrthoRankError: an argument out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> ids = torch.arange(480).view(10, 48) % 61
        >>> evaluator = CorrectedEvaluator(LayerStack(LlamaForCausalLM(config).eval()), ids[:2], ids[2:], rank=4)
        >>> abs(evaluator.loss({1: 0.5, 2: 0}) - evaluator.loss([])) < 1.0
        True
    """

    def __init__(
        self,
        stack: "LayerStack",
        input_ids: Tensor,
        fit_ids: Tensor,
        *,
        rank: int = 64,
        refit: bool = True,
        memory: int | None = None,
        **options: Any,
    ) -> None:
        check_windows(stack.model, fit_ids, least=2)
        check_integer("rank", rank, 1, stack.model.config.get_text_config().hidden_size)
        self.fit_ids, self.rank, self.refit = fit_ids, rank, refit
        self._maps: dict[Ratios, Fitted] = {}
        check_bytes("memory", memory)
        self._fit_states = States(states_budget(torch.device("cpu")) if memory is None else memory)
        super().__init__(stack, input_ids, memory=memory, **options)

    @cached_property
    def fingerprint(self) -> str:
        """As `Evaluator.fingerprint`, of the fit, too."""
        ids = hashlib.sha256(self.fit_ids.cpu().numpy().astype("<i8").tobytes()).hexdigest()
        text = f"{super().fingerprint} {list(self.fit_ids.shape)} {ids} {self.rank} {self.refit}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def start(self, plan: Plan, layers: Iterable[int] | None = None) -> None:
        """As `Evaluator.start`."""
        super().start(plan, layers)
        self._trunk = self._ratios(plan)
        self._fit_states.follow(self._trunk, min(self._kept_at, default=0))
        self._forget(self._trunk)

    def use_batch_size(self, batch_size: int) -> None:
        """As `Evaluator.use_batch_size`."""
        for name in ("_windows", "_dense"):
            self.__dict__.pop(name, None)
        self._maps.clear()
        self._fit_states = States(self._fit_states.budget)
        super().use_batch_size(batch_size)

    def maps(self, plan: Plan) -> dict[int, Fitted]:
        """The maps that ``plan`` is evaluated with, by layer."""
        ratios = self._ratios(plan)
        return {layer: self._map(ratios, layer) for layer, ratio in enumerate(ratios) if ratio < 1}

    def window_losses(self, plan: Plan, windows: range, most: float = float("inf")) -> list[float] | None:
        """As `Evaluator.window_losses`."""
        if self.refit:  # the maps of other branches are many, and of no use to this one
            self._forget(self._trunk, self._ratios(plan))
        return super().window_losses(plan, windows, most)

    def _run(self, ratios: Ratios, layer: int, hidden: Tensor, inputs: "Pass") -> Tensor:
        layer_map = self._map(ratios, layer).layer_map if ratios[layer] < 1 else None
        return self.stack.run(layer, hidden, inputs, ratios[layer], self.criterion, layer_map, **self.options)

    def _is_kept(self, prefix: Ratios) -> bool:
        layers = [layer for layer, ratio in enumerate(prefix) if ratio < 1]
        own = all(self._map_of(prefix, layer) == prefix[: layer + 1] for layer in layers)
        return own and super()._is_kept(prefix)  # what other maps leave is no state of these layers

    def _map_of(self, ratios: Ratios, layer: int) -> Ratios:
        """The layers whose map ``layer`` has in a plan with ``ratios``: those up to it, of one plan or the other."""
        if not self.refit and ratios[:layer] != self._trunk[:layer] and self._trunk[layer] == ratios[layer]:
            return self._trunk[: layer + 1]
        return ratios[: layer + 1]

    def _map(self, ratios: Ratios, layer: int) -> Fitted:
        prefix = self._map_of(ratios, layer)
        if prefix not in self._maps:
            self._behind(prefix, self._fit_state(prefix[:-1]))
        return self._maps[prefix]

    def _forget(self, *plans: Ratios) -> None:
        """Drop the maps of other plans."""
        known = self._maps.items()
        self._maps = {of: found for of, found in known if any(plan[: len(of)] == of for plan in plans)}

    @cached_property
    def _windows(self) -> FitWindows:
        how = OrthoRankConfig(layers=[], criterion=self.criterion, **self.options)
        return FitWindows(self.stack, self.fit_ids, how, batch_size=self.batch_size)

    @cached_property
    def _dense(self) -> list[Tensor]:
        """The dense model's states at the input of each layer, and behind the last."""
        states = [torch.cat(list(self._windows.embedded()))]
        for layer in range(self.stack.num_layers):
            states.append(torch.cat(list(self._windows.dense(layer, self._split(states[-1])))))
        return states

    def _split(self, state: Tensor) -> tuple[Tensor, ...]:
        return state.split(self.batch_size)

    def _fit_state(self, prefix: Ratios) -> Tensor:
        """The state of the fit's windows behind layers with these ratios."""
        dense = next((layer for layer, ratio in enumerate(prefix) if ratio < 1), len(prefix))
        layer, state = self._fit_states.longest(prefix) or (0, self._dense[0])
        if layer <= dense:
            layer, state = dense, self._dense[dense]
        while layer < len(prefix):
            layer += 1
            state = self._behind(prefix[:layer], state)
        return state

    def _behind(self, prefix: Ratios, state: Tensor) -> Tensor:
        """The state behind the last of these layers, given that before it; its map is fitted if it is not known."""
        layer, ratio = len(prefix) - 1, prefix[-1]
        if ratio == 1:
            state = torch.cat(list(self._windows.dense(layer, self._split(state))))
        else:
            state = state.clone()
            parts = self._split(state)
            if prefix in self._maps:
                self._windows.follow(layer, ratio, self._maps[prefix], parts)
            else:
                wanted = self._split(self._dense[layer + 1])
                self._maps[prefix] = self._windows.fit(layer, ratio, self.rank, parts, wanted)
        if super()._is_kept(prefix):
            self._fit_states.offer(prefix, state)
        return state
