"""Cosines of the normalised states: of the sink with other tokens, and of a token with itself in other layers.

Paper, section 2: after the sink forms, other tokens turn towards it as layers progress (Observation 1, Figures 2 and
7), while its own state hardly moves (Observation 2, Figures 3 and 6).
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.stack.layers import LayerStack

OTHERS = 10  # tokens 1 to 10, as in the paper's Figure 2


@dataclass(frozen=True)
class Similarities:
    """What `measure_similarities` found; means over passages, of the states after each layer's input norm.

    Args:
        passages, tokens: how many, of how many tokens each.
        other: the position of the token that the sink is compared with.
        sink_with: ``[layers][others]``: cosine of token 0 with tokens 1, 2, ... (Figure 2).
        sink_with_error: ``[layers]``: standard error over passages of their mean.
        other_with: ``[layers][others]``: of token ``other`` with the tokens after it (Figure 7, lower half).
        sink_across, other_across: ``[layers][layers]``: of token 0, and of token ``other``, with itself in another
            layer (Figure 3).
    """

    passages: int
    tokens: int
    other: int
    sink_with: tuple[tuple[float, ...], ...]
    sink_with_error: tuple[float, ...]
    other_with: tuple[tuple[float, ...], ...]
    sink_across: tuple[tuple[float, ...], ...]
    other_across: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON stores them."""
        return dataclasses.asdict(self)


@torch.no_grad()
def measure_similarities(stack: LayerStack, passages: Tensor, *, other: int = 5) -> Similarities:
    """Measure the cosines on ``passages``.

    Args:
        stack: the model, layer by layer. passages: int64 ``[passages, tokens]``, at least 12 tokens each.
        other: position of the token that the sink is compared with, 1 or more.

    Raises:
        OrthoRankError: passages of another shape, or too short.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> found = measure_similarities(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32).view(2, 16))
        >>> len(found.sink_with), len(found.sink_with[0]), round(found.sink_across[1][1], 4)
        (3, 10, 1.0)
    """
    if passages.dim() != 2 or passages.shape[0] < 1 or other < 1 or passages.shape[1] < other + 2:
        raise OrthoRankError(
            f"passages has shape {list(passages.shape)} and other is {other}; it must be [passages, tokens] with at "
            f"least {max(other, 1) + 2} tokens, and other 1 or more"
        )
    if passages.shape[1] < OTHERS + 1:
        raise OrthoRankError(f"passages has {passages.shape[1]} tokens; at least {OTHERS + 1} are needed")
    inputs = stack.embed(passages)
    hidden = inputs.hidden_states
    sinks, tokens, with_sink, with_other = [], [], [], []
    for layer in range(stack.num_layers):
        normed = torch.nn.functional.normalize(stack.normed(layer, hidden).float(), dim=-1)
        sinks.append(normed[:, 0])
        tokens.append(normed[:, other])
        with_sink.append(_cosines(normed[:, 0], normed[:, 1 : OTHERS + 1]))
        with_other.append(_cosines(normed[:, other], normed[:, other + 1 : other + 1 + OTHERS]))
        hidden = stack.run(layer, hidden, inputs)
    each = torch.stack(with_sink).mean(dim=2)  # [layers, passages]
    count = passages.shape[0]
    error = each.std(dim=1) / count**0.5 if count > 1 else torch.full_like(each[:, 0], torch.nan)
    return Similarities(
        passages=count,
        tokens=passages.shape[1],
        other=other,
        sink_with=_rows(torch.stack(with_sink).mean(dim=1)),
        sink_with_error=tuple(error.tolist()),
        other_with=_rows(torch.stack(with_other).mean(dim=1)),
        sink_across=_rows(_across(sinks)),
        other_across=_rows(_across(tokens)),
    )


def _cosines(one: Tensor, many: Tensor) -> Tensor:
    """``[passages, hidden]`` with ``[passages, tokens, hidden]``, both of length 1: ``[passages, tokens]``."""
    return torch.einsum("ph,pth->pt", one, many)


def _across(states: list[Tensor]) -> Tensor:
    """Cosine of each layer's state with each other's, mean over passages: ``[layers, layers]``."""
    stacked = torch.stack([state.cpu() for state in states])
    return torch.einsum("lph,mph->lm", stacked, stacked) / stacked.shape[1]


def _rows(matrix: Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(row) for row in matrix.tolist())
