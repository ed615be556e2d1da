"""What is kept with a cache: the sink token's normalised state at each selected layer, and which plan filled it.

Position 0 attends only to itself, so its state at a layer depends on the first token alone. Later chunks of a prompt
are scored against the vector that the first chunk left here.
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calls.context import ForwardContext
from orthorank.common.errors import OrthoRankError
from orthorank.common.patching import Patch

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

ATTRIBUTE = "orthorank_sinks"
PLAN = "orthorank_plan"  # the `identity` of the plan that fills a cache from its first token on
# The fields that matter only under the value of another one.
UNDER = {"seed": ("criterion", "random"), "select_window": ("select", "window"), "thresholds": ("select", "threshold")}
SETTINGS = (
    "criterion",
    "seed",
    "keep_multiple",
    "min_prompt",
    "select",
    "select_window",
    "thresholds",
    "kv",
    "update_sink",
    "sinks",
    "decode",
)


def identity(plan: "OrthoRankConfig") -> str:
    """What decides the contents of a cache that ``plan`` fills, as JSON; "" where that is what the dense model does.

    ``keep_last`` is left out: it is said call by call (`Handle.prefilling`), and a prompt may end anywhere.

    >>> from orthorank import OrthoRankConfig
    >>> identity(OrthoRankConfig(layers=[2], keep_ratio=1))
    ''
    >>> print(identity(OrthoRankConfig(layers=[2], keep_ratio=0.5))[:47])
    {"keep ratio by layer": {"2": 0.5}, "criterion"
    """
    ratios = {layer: plan.ratio(layer) for layer in plan.layers if plan.ratio(layer) != 1}
    names = [name for name in SETTINGS if name not in UNDER or getattr(plan, UNDER[name][0]) == UNDER[name][1]]
    said = {"keep ratio by layer": ratios} | {name: getattr(plan, name) for name in names}
    if plan.correction is not None:
        said["correction"] = plan.correction.sha256[:16]
    return json.dumps(said) if ratios else ""


def check_filled_by(cache: Any, plan: str) -> None:
    """``cache`` was filled by the plan of that `identity`.

    Raises:
        OrthoRankError: it was filled without a plan, or by another one; the message says what differs.
    """
    filled = getattr(cache, PLAN, "")
    if filled == plan:
        return
    wanted, found = (json.loads(text) if text else {} for text in (plan, filled))
    if not found:
        history = "without a plan (by the dense model, or inside `with handle.decoding():`), and this model has one"
    elif not wanted:
        history = "by a plan, and the one applied now leaves every layer dense"
    else:
        names = [name for name in found | wanted if found.get(name) != wanted.get(name)]
        said = [
            f"its {name} is {found.get(name)}, and that of the one applied now {wanted.get(name)}" for name in names
        ]
        history = f"by another plan: {'; '.join(said)}"
    dense = json.loads(plan).get("decode") == "dense" if plan else True
    raise OrthoRankError(f"the cache was filled {history}; {_remedy(dense)}")


def check(cache: Any, layers: list[int], batch: int, decode: str = "dense") -> None:
    """``cache`` holds the sinks of every one of ``layers``, for ``batch`` rows; ``decode`` is the plan's.

    Raises:
        OrthoRankError: tokens were cached before the layers selected any, or the cache has another batch size.
    """
    sinks: dict[int, Tensor] = getattr(cache, ATTRIBUTE, {})
    for layer in layers:
        if layer not in sinks:
            raise OrthoRankError(
                f"the cache was filled without layer {layer} selecting tokens, so the sink token's state is not known; "
                f"{_remedy(decode == 'dense')}"
            )
        if sinks[layer].shape[0] != batch:
            raise OrthoRankError(
                f"the cache holds the sinks of {sinks[layer].shape[0]} rows and the call has {batch}; "
                "prefill the batch that you continue"
            )


def _remedy(dense: bool) -> str:
    """``dense``: whether the plan's generated tokens are."""
    other = "" if dense else "use a plan with decode='dense' and "
    what = "to process the new tokens densely" if dense else "there"
    return (
        f"prefill from an empty cache with the plan applied, or {other}continue inside `with handle.decoding():` {what}"
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
        result = self.run_original(argument)
        sinks: dict[int, Tensor] = getattr(self.owner, ATTRIBUTE)
        for layer, vectors in sinks.items():
            sinks[layer] = REARRANGED[self.name](vectors, argument)
        return result


def continued(
    call: ForwardContext, cache: Any, layer: int, hidden_states: Tensor, norm: Callable[[Tensor], Tensor]
) -> Tensor:
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
