"""The sink token's normalised state at each selected layer, kept with the cache.

Position 0 attends only to itself, so its state at a layer depends on the first token alone. Later chunks of a prompt
are scored against the vector that the first chunk left here.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orthorank.calls import Call
from orthorank.errors import OrthoRankError
from orthorank.patching import Patch

ATTRIBUTE = "orthorank_sinks"


def check(cache: Any, layers: list[int], batch: int, decode: str = "dense") -> None:
    """``cache`` holds the sinks of every one of ``layers``, for ``batch`` rows; ``decode`` is the plan's.

    Raises:
        OrthoRankError: the cache was filled without this plan, or has another batch size.
    """
    sinks: dict[int, Tensor] = getattr(cache, ATTRIBUTE, {})
    for layer in layers:
        if layer not in sinks:
            raise OrthoRankError(
                f"the cache was filled without layer {layer} selecting tokens (by the dense model, or by another "
                "plan), so the sink token's state is not known; prefill from an empty cache with the plan applied, or "
                + (
                    "continue inside `with handle.decoding():` to process the new tokens densely"
                    if decode == "dense"
                    else "use a plan with decode='dense' and continue inside `with handle.decoding():`"
                )
            )
        if sinks[layer].shape[0] != batch:
            raise OrthoRankError(
                f"the cache holds the sinks of {sinks[layer].shape[0]} rows and the call has {batch}; "
                "prefill the batch that you continue"
            )


def keep(cache: Any, layer: int, vectors: Tensor) -> None:
    """Store the normalised sink states ``[batch, hidden]`` of ``layer`` with ``cache``."""
    if not hasattr(cache, ATTRIBUTE):
        setattr(cache, ATTRIBUTE, {})
        for name in REARRANGED:
            if hasattr(cache, name):
                _Rearrange(cache, name)
    getattr(cache, ATTRIBUTE)[layer] = vectors


# What a cache can do to its rows (beam search, contrastive search, several sequences of one prompt).
REARRANGED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": lambda vectors, rows: vectors.index_select(0, rows.to(vectors.device)),
    "batch_repeat_interleave": lambda vectors, repeats: vectors.repeat_interleave(repeats, dim=0),
    "batch_select_indices": lambda vectors, rows: vectors[rows],
}


class _Rearrange(Patch):
    """One of these methods of a cache, which the sinks' states follow."""

    def __call__(self, argument: Any) -> Any:
        result = self.original(argument)
        sinks: dict[int, Tensor] = getattr(self.owner, ATTRIBUTE)
        for layer, vectors in sinks.items():
            sinks[layer] = REARRANGED[self.name](vectors, argument)
        return result


def continued(call: Call, cache: Any, layer: int, hidden_states: Tensor, norm: Callable[[Tensor], Tensor]) -> Tensor:
    """The sink vectors ``[batch, hidden]`` for a later chunk: stored, or of this chunk for rows that begin in it."""
    vectors: Tensor = getattr(cache, ATTRIBUTE)[layer]
    if call.starts is None or call.sink_positions is None:
        return vectors
    own = norm(rows_at(hidden_states, call.starts))
    return torch.where(call.sink_positions[:, None] >= 0, own, vectors)


def rows_at(x: Tensor, index: Tensor | None) -> Tensor:
    """A copy ``[batch, hidden]`` of one row of each batch entry of ``x [batch, tokens, hidden]``."""
    if index is None:
        return x[:, 0].clone()
    return x[torch.arange(x.shape[0], device=x.device), index.long()]
