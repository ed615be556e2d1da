"""ShortGPT's block influence: how much a layer turns its tokens' states. The least influential are taken.

    BI of layer l = mean over tokens of 1 - cos(h_l, h_{l+1}),   h_l the layer's input, h_{l+1} its own output

The layer's own output is meant: the last of a Hugging Face model's ``hidden_states`` has gone through the final norm.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError, check_integer
from orthorank.families.known import device_of
from orthorank.stack.layers import LayerStack
from orthorank.stack.resources import OneProcess, Processes


@torch.no_grad()
def block_influence(
    stack: LayerStack,
    input_ids: Tensor,
    *,
    batch_size: int = 1,
    processes: Processes | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[int, float]:
    """The block influence of every layer, from one forward pass.

    Args:
        stack: the model, layer by layer.
        input_ids: int64 ``[windows, tokens]``.
        batch_size: windows that run together. The values depend on it by rounding only.
        processes: a group of processes with the same arguments, which share the windows among them.
        on_batch: called after each batch of this process as ``on_batch(done, total)``.

    Returns:
        The influence by layer, from 0 (the layer turns no state) to 2; the lowest is least important.

    Raises:
        OrthoRankError: an argument out of range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> scores = block_influence(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None])
        >>> len(scores), all(0 < score < 2 for score in scores.values())
        (4, True)
    """
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise OrthoRankError(f"input_ids has shape {list(input_ids.shape)}; it must be [windows, tokens]")
    check_integer("batch_size", batch_size, 1)
    group = OneProcess() if processes is None else processes
    parts = input_ids.to(device_of(stack.model)).split(batch_size)
    own = parts[group.rank :: group.size]
    sums: list[float] = []
    for done, ids in enumerate(own, start=1):
        sums += _summed(stack, ids)
        if on_batch is not None:
            on_batch(done, len(own))
    gathered = [iter(values) for values in group.gather(sums)]
    totals = [0.0] * stack.num_layers
    for batch in range(len(parts)):  # in the order of the batches, so that the sums have the bits of one process
        for layer in range(stack.num_layers):
            totals[layer] += next(gathered[batch % group.size])
    return {layer: total / input_ids.numel() for layer, total in enumerate(totals)}


def _summed(stack: LayerStack, ids: Tensor) -> list[float]:
    """Each layer's sum of 1 - cos over the tokens of ``ids``."""
    inputs = stack.embed(ids)
    hidden, sums = inputs.hidden_states, []
    for layer in range(stack.num_layers):
        output = stack.run(layer, hidden, inputs)
        before, after = hidden.to(output.device).double(), output.double()
        sums.append((1 - torch.cosine_similarity(before, after, dim=-1)).sum().item())
        hidden = output
    return sums
