"""The maps of a corrected plan, trained for some steps so that the plan's next tokens are those of the dense model.

A fit in closed form brings each layer's output as near to the dense model's as it can, one layer after the other. What
counts is the distribution of the next token at the top, for which all maps work together. Here they are moved to
lessen KL(dense || plan), by Adam, from the closed form on; the model's weights stay as they are, and the teacher is the
same model without the plan.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from orthorank.calibration.fitting import SELECTED_BY
from orthorank.calibration.progress import DistillProgress, identity_of
from orthorank.calibration.threshold import RANKED_BY
from orthorank.calibration.windows import check_windows
from orthorank.common.errors import OrthoRankError, check_integer, check_integers
from orthorank.correction import Correction, LayerMap
from orthorank.families.known import device_of
from orthorank.hf.apply import check_plan
from orthorank.stack.layers import LOGITS_AT_ONCE, LayerStack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orthorank.config import OrthoRankConfig

OnStep = Callable[[int, int, float], None]
RATE = 0.02  # of the first full step, as a share of the root mean square of each map's parts
WARM = 5  # steps in which the rate rises to that; then it falls to 0 along half a cosine
BETAS = (0.9, 0.98)
SAVED = 8  # steps between two states on disk


def distill_correction(
    model: "PreTrainedModel",
    input_ids: Tensor,
    plan: "OrthoRankConfig",
    *,
    steps: int = 64,
    batch_size: int = 2,
    rate: float = RATE,
    seed: int = 0,
    on_step: OnStep | None = None,
    save_to: Path | None = None,
) -> "OrthoRankConfig":
    """``plan``, whose layers have maps, with maps that bring its next tokens nearer to the dense model's.

    Beyond the paper, as `fit_correction`; it is what costs time: a step takes about as long as three forwards of its
    windows. The states of all windows at the lowest changed layer and at the top are held in host memory.

    Args:
        model: without a plan applied, in eval mode. Its weights are not changed.
        input_ids: int64 ``[windows, tokens]``, 2 windows or more, each a text of its own: those that the maps were
            fitted to, or more of the same kinds.
        plan: a corrected one; see `orthorank.fit_correction`.
        steps: of Adam; each sees ``batch_size`` windows, in an order drawn with ``seed``, anew when all were seen.
        rate: of learning, as a share of the root mean square of each part of each map.
        on_step: called after each step as ``on_step(steps done, steps in all, KL in nats a token)``.
        save_to: a file that gets the state every few steps. One that is there is gone on with, to the same bits. The
            caller deletes it.

    Returns:
        A new plan. ``calibration["correction"]["distilled"]`` says how; what the record says that maps explain is of
        the fit before.

    Raises:
        OrthoRankError: the plan has no maps, selects by thresholds (which are of the states that the fit left) or is
            another model's, an argument is out of range, or ``save_to`` is of another run.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank import OrthoRankConfig, fit_correction
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> model, ids = LlamaForCausalLM(config).eval(), torch.arange(240).view(8, 30) % 64
        >>> fitted = fit_correction(model, ids, OrthoRankConfig(layers=[1, 2], keep_ratio=0), rank=4)
        >>> found = distill_correction(model, ids, fitted, steps=3)
        >>> found.calibration["correction"]["distilled"]["steps"], found == fitted
        (3, False)
    """
    _check(model, input_ids, plan, steps=steps, batch_size=batch_size, rate=rate)
    settings: dict[str, Any] = {"steps": steps, "batch_size": batch_size, "rate": rate, "seed": seed}
    identity = identity_of(model, input_ids, plan, **settings, maps=_maps(plan).sha256)
    with torch.inference_mode(False), _frozen(model):
        student = _Student(model, input_ids, plan, batch_size)
        progress = DistillProgress(identity, save_to, student.parts)
        optimizer = _adam(student.parts, rate)
        losses = progress.load(optimizer)
        order = _order(len(input_ids), steps * batch_size, seed).split(batch_size)
        for step in range(len(losses), steps):
            for group in optimizer.param_groups:
                group["lr"] = group["full"] * _share_of_rate(step, steps)
            optimizer.zero_grad()
            losses.append(student.backward(order[step]))
            optimizer.step()
            if (step + 1) % SAVED == 0:
                progress.save(optimizer, losses)
            if on_step is not None:
                on_step(step + 1, steps, losses[-1])
        maps = student.maps()
    few = max(1, min(SAVED, steps // 2))
    said = settings | {"windows": len(input_ids), "kl": [_mean(losses[:few]), _mean(losses[-few:])]}
    record = plan.calibration.get("correction", {}) | {"distilled": said}
    return dataclasses.replace(
        plan, correction=Correction(maps), calibration=plan.calibration | {"correction": record}, measured={}
    )


def _check(model: "PreTrainedModel", input_ids: Tensor, plan: "OrthoRankConfig", **settings: Any) -> None:
    check_plan(model, plan)
    check_windows(model, input_ids, least=2)
    check_integers(settings, steps=1, batch_size=1)
    rate = settings["rate"]
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate <= 1:
        raise OrthoRankError(f"rate is {rate!r}; it must be a number above 0, and 1 at most")
    if plan.correction is None:
        raise OrthoRankError("the plan has no maps to distil; fit some with orthorank.fit_correction")
    check_distillable(plan)
    check_integer("windows of a step (batch_size)", settings["batch_size"], 1, len(input_ids))


def check_distillable(plan: "OrthoRankConfig") -> None:
    """Maps of the plan, fitted or not yet, may be distilled.

    Raises:
        OrthoRankError: it selects by thresholds.
    """
    if plan.select == "threshold":
        raise OrthoRankError(
            "the plan selects by thresholds, which are of the states that the fitted maps leave; distil a plan with "
            "select='topk' or 'window'"
        )


def _maps(plan: "OrthoRankConfig") -> Correction:
    assert plan.correction is not None
    return plan.correction


class _Student:
    """The model with the plan from its lowest changed layer on, and the dense model's states at the top."""

    def __init__(self, model: "PreTrainedModel", input_ids: Tensor, plan: "OrthoRankConfig", batch_size: int) -> None:
        self.stack, self.plan, self.input_ids = LayerStack(model), plan, input_ids
        self.stack.records_gradients = True
        self.options: dict[str, Any] = {name: getattr(plan, name) for name in (*RANKED_BY, *SELECTED_BY)}
        self.first = min(layer for layer, ratio in plan.ratios.items() if ratio < 1)
        self.parts = {
            (layer, name): part.to(device_of(self.stack.layers[layer]), torch.float32, copy=True).requires_grad_()
            for layer, layer_map in _maps(plan).maps.items()
            for name, part in zip(LayerMap._fields, layer_map, strict=True)
        }
        self.below, self.top = self._dense(batch_size)

    def maps(self) -> dict[int, LayerMap]:
        """The maps as they are now."""
        return {
            layer: LayerMap(*(self.parts[layer, name].detach() for name in LayerMap._fields))
            for layer in _maps(self.plan).maps
        }

    @torch.no_grad()
    def _dense(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """The dense model's states before the lowest changed layer and behind the last, on the host."""
        below, top = [], []
        for ids in self.input_ids.to(device_of(self.stack.model)).split(batch_size):
            inputs = self.stack.embed(ids)
            hidden = inputs.hidden_states
            for layer in range(self.stack.num_layers):
                if layer == self.first:
                    below.append(hidden.cpu())
                hidden = self.stack.run(layer, hidden, inputs)
            top.append(hidden.cpu())
        return torch.cat(below), torch.cat(top)

    @torch.enable_grad()
    def backward(self, windows: Tensor) -> float:
        """KL(dense || plan) of some windows, nats a token; its gradient is added to that of the maps' parts."""
        inputs = self.stack.embed(self.input_ids[windows].to(device_of(self.stack.model)))
        hidden = self.below[windows]
        for layer in range(self.first, self.stack.num_layers):
            given = {"layer_map": self._map(layer), **self.options} if self.plan.ratio(layer) < 1 else {}
            hidden = self.stack.run(layer, hidden, inputs, self.plan.ratio(layer), **given)
        loss, gradient = self._divergence(hidden.detach(), self.top[windows].to(hidden.device))
        hidden.backward(gradient)
        return loss

    def _map(self, layer: int) -> LayerMap | None:
        if (layer, "up") not in self.parts:
            return None
        return LayerMap(*(self.parts[layer, name] for name in LayerMap._fields))

    def _divergence(self, hidden: Tensor, top: Tensor) -> tuple[float, Tensor]:
        """The divergence and its gradient with respect to ``hidden``; the logits exist for a slice of tokens a time."""
        states, wanted = hidden.flatten(0, 1), top.flatten(0, 1)
        step = max(1, LOGITS_AT_ONCE // self.stack.model.config.get_text_config().vocab_size)
        total, gradients = 0.0, []
        for state, teacher in zip(states.split(step), wanted.split(step), strict=True):
            with torch.no_grad():
                target = self.stack.logits_with_gradient(teacher[None])[0].float().log_softmax(-1)
            part = state.detach().requires_grad_()
            said = self.stack.logits_with_gradient(part[None])[0].float().log_softmax(-1)
            loss = kl_div(said, target, reduction="sum", log_target=True) / len(states)
            gradients += torch.autograd.grad(loss, part)
            total += loss.item()
        return total, torch.cat(gradients).view_as(hidden)


def _adam(parts: dict[tuple[int, str], Tensor], rate: float) -> torch.optim.Adam:
    """With a rate of its own for each part: some are a thousand times larger than others."""
    groups = [
        {"params": [part], "full": rate * max(1e-8, part.detach().square().mean().sqrt().item())}
        for part in parts.values()
    ]
    return torch.optim.Adam(groups, lr=0.0, betas=BETAS)


def _share_of_rate(step: int, steps: int) -> float:
    """What a step's rate is of the full one.

    >>> [round(_share_of_rate(step, 65), 2) for step in (0, 4, 5, 35, 64)]
    [0.2, 1.0, 1.0, 0.5, 0.0]
    """
    if step < WARM:
        return (step + 1) / WARM
    return (1 + math.cos(math.pi * (step - WARM) / max(1, steps - WARM))) / 2


def _order(windows: int, wanted: int, seed: int) -> Tensor:
    """Numbers of windows, ``[wanted]``: all of them in a random order, then all in another, and so on."""
    draw = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(windows, generator=draw) for _ in range(-(-wanted // windows))])[:wanted]


@contextmanager
def _frozen(model: "PreTrainedModel") -> Iterator[None]:
    """Inside, no weight of the model wants a gradient."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)
