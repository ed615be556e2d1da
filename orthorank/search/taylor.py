"""Shortened LLaMA's Taylor score: what a layer's weights do to the loss, to first order, from one backward pass.

    score of a layer = sum over its weights w of |w * dL/dw|,   L the mean token loss of all calibration windows

The pass goes through one layer at a time: a first, plain forward keeps each layer's input in main memory; then, from
the last layer down, each layer runs once more with gradients. So only one layer has gradients at any time, and they are
summed over the batches before the absolute value is taken.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orthorank.common.errors import OrthoRankError, check_integer
from orthorank.families.known import device_of
from orthorank.search.one_shot import layer_weights
from orthorank.stack.layers import LayerStack, Pass
from orthorank.stack.resources import Group, OneProcess


def taylor_scores(
    stack: LayerStack,
    input_ids: Tensor,
    *,
    batch_size: int = 1,
    processes: Group | None = None,
    on_layer: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """The Taylor score of every layer, norms included. The model is left as it was: no gradient stays in it.

    Args:
        stack: the model, layer by layer.
        input_ids: int64 ``[windows, tokens]``, at least 2 tokens.
        batch_size: windows that run together. The scores depend on it by rounding only.
        processes: a group of processes with the same arguments, which share the windows among them.
        on_layer: called after each layer as ``on_layer(done, total)``.

    Returns:
        The scores by layer; the lowest is least important.

    Raises:
        OrthoRankError: an argument out of range, or weights that have no gradient here (offloaded, quantised).

    Memory: ``layers * windows * tokens * hidden`` values in main memory, and on the device one layer's gradients in
    float32 beside what one layer's backward pass needs.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> scores = taylor_scores(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None])
        >>> len(scores), min(scores.values()) > 0
        (4, True)
    """
    if input_ids.dim() != 2 or input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
        raise OrthoRankError(
            f"input_ids has shape {list(input_ids.shape)}; it must be [windows, tokens] with at least one window of 2 "
            "tokens"
        )
    check_integer("batch_size", batch_size, 1)
    group = OneProcess() if processes is None else processes
    for layer in range(stack.num_layers):
        layer_weights(stack, layer)  # raises before the long work
    batches = input_ids.to(device_of(stack.model)).split(batch_size)[group.rank :: group.size]
    predictions = input_ids.shape[0] * (input_ids.shape[1] - 1)
    scores: dict[int, float] = {}
    with torch.inference_mode(False), _as_it_was(stack.model):
        runs = [_Run(stack, ids, predictions) for ids in batches]
        for layer in reversed(range(stack.num_layers)):
            scores[layer] = _layer_score(stack, layer, runs, group)
            if on_layer is not None:
                on_layer(len(scores), stack.num_layers)
    return dict(sorted(scores.items()))


class _Run:
    """A batch of windows on its way back: the input of each layer, and the gradient of what came out of the last one.

    Args:
        predictions: of all batches, over which the loss is the mean.
    """

    def __init__(self, stack: LayerStack, ids: Tensor, predictions: int) -> None:
        self.stack = stack
        self.inputs: Pass = stack.embed(ids)
        hidden = self.inputs.hidden_states
        self.states: list[Tensor] = []
        for layer in range(stack.num_layers):
            self.states.append(hidden.to("cpu"))
            hidden = stack.run(layer, hidden, self.inputs)
        self.gradient = stack.loss_gradient(hidden, ids) / predictions

    def back_through(self, layer: int, weights: list[nn.Parameter]) -> list[Tensor | None]:
        """Gradients of ``weights``; the run's own gradient becomes that of the layer's input."""
        module = self.stack.decoder.layers[layer]
        with torch.enable_grad():
            hidden = self.states.pop().to(device_of(module)).detach().requires_grad_()
            output: Any = module(hidden, **self.inputs.layer_kwargs[layer])
            output = output[0] if isinstance(output, tuple) else output
            gradients = torch.autograd.grad(
                output, [hidden, *weights], grad_outputs=self.gradient.to(output), allow_unused=True
            )
        self.gradient = gradients[0]
        return list(gradients[1:])


def _layer_score(stack: LayerStack, layer: int, runs: list[_Run], group: Group) -> float:
    weights = layer_weights(stack, layer)
    for weight in weights:
        weight.requires_grad_(True)
    sums = [torch.zeros_like(weight, dtype=torch.float32, requires_grad=False) for weight in weights]
    for run in runs:
        for total, gradient in zip(sums, run.back_through(layer, weights), strict=True):
            if gradient is not None:  # experts that no token went to have none
                total += gradient
    for weight in weights:
        weight.requires_grad_(False)
    score = 0.0
    for weight, total in zip(weights, sums, strict=True):
        group.add(total)
        score += (total * weight.detach()).abs().sum(dtype=torch.float64).item()
    return score


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Within the block no weight asks for gradients and nothing drops out; afterwards all is as before."""
    asked = [(weight, weight.requires_grad) for weight in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    try:
        for weight, _ in asked:
            weight.requires_grad_(False)
        model.eval()
        yield
    finally:
        for weight, before in asked:
            weight.requires_grad_(before)
        for module, mode in training:
            module.training = mode
