"""Which layers updated which token of a text: the selection itself, to be looked at."""

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calls.context import ForwardContext
from orthorank.common.errors import OrthoRankError
from orthorank.common.texts import check_ids
from orthorank.config import OrthoRankConfig
from orthorank.hf.apply import apply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenMap:
    """The tokens of a text and the layers that updated each.

    Args:
        pieces: the text of each token; together they are the text that was read. A token that is a part of a letter
            is an empty piece behind the one that has the letter.
        layers: by token, the selecting layers that updated it.
        selecting: all selecting layers of the plan.
    """

    pieces: tuple[str, ...]
    layers: tuple[tuple[int, ...], ...]
    selecting: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON stores them."""
        return dataclasses.asdict(self)


@torch.no_grad()
def token_map(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    plan: OrthoRankConfig,
    text: str,
    tokens: int = 256,
) -> TokenMap:
    """Read the first ``tokens`` tokens of ``text`` with ``plan`` applied, and note what each layer selects.

    Args:
        model: a causal model without a plan applied; left as it was.
        tokenizer: a fast one (it knows where in the text a token stands).

    Raises:
        OrthoRankError: the tokenizer is slow, the text is empty, or the plan does not fit.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise OrthoRankError("the tokenizer does not say where its tokens stand in a text; use the fast one")
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"][:tokens], encoded["offset_mapping"][:tokens]
    if not ids:
        raise OrthoRankError("text has no tokens; give some words")
    input_ids = torch.tensor([ids])
    check_ids(input_ids, model)
    chosen: dict[int, set[int]] = {}

    def watch(layer: int, positions: Tensor, call: ForwardContext) -> None:
        chosen[layer] = {position for position in positions[0].tolist() if position >= 0}

    with apply(model, plan) as handle, handle.watching(watch):
        model(input_ids=input_ids.to(model.device), use_cache=False)
    return TokenMap(
        pieces=_pieces(text, offsets),
        layers=tuple(
            tuple(layer for layer in sorted(chosen) if position in chosen[layer]) for position in range(len(ids))
        ),
        selecting=tuple(sorted(chosen)),
    )


def _pieces(text: str, offsets: list[tuple[int, int]]) -> tuple[str, ...]:
    """The text cut where tokens begin; what no token claims (spaces that a tokenizer drops) goes to the one before.

    >>> _pieces("a bc", [(0, 0), (0, 1), (2, 4)])
    ('', 'a ', 'bc')
    """
    end = max((stop for _, stop in offsets), default=0)
    cuts: list[int] = []
    for begin, _ in offsets:
        cuts.append(max(begin, cuts[-1] if cuts else 0))
    if cuts:
        cuts[0] = 0
    return tuple(text[begin:stop] for begin, stop in zip(cuts, [*cuts[1:], end], strict=True))
