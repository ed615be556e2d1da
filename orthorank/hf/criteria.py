"""The scores that rank tokens: the paper's, those it is compared with, and those of your own.

Every criterion is turned into a *rank*, float32 for each token, of which the smallest are selected: NaN after +inf and
the sink after everything. None depends on padding or on the batch; what is pointwise looks at one token, at the stored
state of the sink and at the token's place in the row alone, so it does not depend on how a prompt is cut into chunks.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthorank.common.criteria import FUSED, find
from orthorank.hf import (
    ablations,  # which registers its criteria
    selection,
)
from orthorank.hf.cache_state import rows_at
from orthorank_kernels import rms_norm_score, rms_norm_select

if TYPE_CHECKING:
    from orthorank.calls.context import ForwardContext
    from orthorank.config import OrthoRankConfig
    from orthorank.families.parts import Parts

# From which cosine to the sink's state on a token is a further sink. The states of sinks are alike, since a few massive
# channels make them, and all others are far away: SmolLM2-135M has 0.94 to 0.97 against at most 0.35.
SINK_COSINE = 0.75


class Chosen(NamedTuple):
    """What a selected layer goes on with.

    Args:
        normed: the input norm of all tokens, ``[batch, tokens, hidden]``.
        positions: the selected tokens, int32 ``[batch, most]``, ascending, -1 past a row's count.
        updated: a copy of the hidden states, to write the result into.
        counts: how many tokens of each row are selected, int32 ``[batch]``.
    """

    normed: Tensor
    positions: Tensor
    updated: Tensor
    counts: Tensor


def norm_and_select(
    plan: "OrthoRankConfig",
    layer: int,
    call: "ForwardContext",
    hidden_states: Tensor,
    norm: dict[str, Any],
    sink: Tensor | None,
    normed: Tensor | None = None,
    parts: "Parts | None" = None,
    copy: bool = True,
) -> Chosen:
    """The input norm of all tokens, and the tokens that ``plan`` selects in ``layer``.

    Args:
        plan: what ranks tokens, and which ranks are selected; call: padding, and where the sinks are.
        hidden_states: ``[batch, tokens, hidden]``; norm: the input norm, as `rms_norm_score` takes it (weight, eps).
        sink: the sinks' states ``[batch, hidden]`` where the rows began in an earlier call, `scored_states` of then;
            None: the rows begin in this call.
        normed: the input norm of all tokens, where its module was called; ``norm`` is the identity then.
        parts: of the layer, for a criterion that needs keys or queries.
        copy: whether to copy the hidden states; else ``updated`` are these themselves.
    """
    one_launch = plan.criterion in FUSED and not plan.update_sink and plan.sinks == "first"
    if one_launch and selection.is_plain(plan, call):
        chosen: Any = rms_norm_select(
            hidden_states if normed is None else normed,
            **norm,
            **selection.request(plan, layer, call),
            score=FUSED[plan.criterion],
            sink=sink,
            starts=call.starts,
            lengths=call.lengths,
            sink_positions=call.sink_positions,
            workspace=call.workspace,
            copy_input=copy and normed is None,
        )
        given, normed = normed, chosen.normed if normed is None else normed
        return Chosen(normed, chosen.positions, _copy(hidden_states, chosen.residual, given, copy), chosen.counts)
    normed, ranks, updated = norm_and_rank(plan, layer, call, hidden_states, norm, sink, normed, parts, copy)
    sinks = call.sinks_left_out
    if plan.update_sink:
        ranks, sinks = ablations.sink_first(call, ranks)
    positions, counts = selection.pick(plan, layer, call, ranks, sinks)
    return Chosen(normed, positions, updated, counts)


def norm_and_rank(
    plan: "OrthoRankConfig",
    layer: int,
    call: "ForwardContext",
    hidden_states: Tensor,
    norm: dict[str, Any],
    sink: Tensor | None = None,
    given: Tensor | None = None,
    parts: "Parts | None" = None,
    copy: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The input norm of all tokens, their ranks, and a copy of ``hidden_states``; arguments as for `norm_and_select`.

    The ranks of the sinks mean nothing. ``given`` is its ``normed``.
    """
    scored: Any = rms_norm_score(
        hidden_states if given is None else given,
        **norm,
        score=FUSED.get(plan.criterion, "inner"),
        sink=sink if _is_of_normed(plan) else None,  # what is kept of the sink may be no state for this score
        starts=call.starts,
        lengths=call.lengths,
        copy_input=copy and given is None,
    )
    normed = scored.normed if given is None else given
    states = scored_states(plan, hidden_states, normed)
    ranks = scored.scores
    if plan.criterion not in FUSED:
        ranks = _ranks(plan, layer, call, states, scored.scores, sink, parts)
    if plan.sinks == "auto":
        alike = rms_norm_score(states, None, 0.0, norm="identity", score="cosine", sink=sink, starts=call.starts)
        ranks = torch.where(alike.scores >= SINK_COSINE, torch.inf, ranks)
    return normed, ranks, _copy(hidden_states, scored.residual, given, copy)


def _copy(hidden_states: Tensor, made: Tensor, given: Tensor | None, copy: bool) -> Tensor:
    """A copy of ``hidden_states``, if one is wanted: the one that the kernel ``made`` if it normed them itself."""
    if not copy:
        return hidden_states
    return made if given is None else hidden_states.clone()


def scored_states(plan: "OrthoRankConfig", hidden_states: Tensor, normed: Tensor) -> Tensor:
    """The states that tokens are compared by, and of which the sinks' are kept: Table 3 calls it the stage."""
    return normed if _is_of_normed(plan) else hidden_states


def _is_of_normed(plan: "OrthoRankConfig") -> bool:
    return plan.criterion in FUSED or find(plan.criterion).normed


def _ranks(
    plan: "OrthoRankConfig",
    layer: int,
    call: "ForwardContext",
    states: Tensor,
    scores: Tensor,
    sink: Tensor | None,
    parts: "Parts | None",
) -> Tensor:
    """What the registered criterion of ``plan`` gives: float32 ``[batch, tokens]``."""
    criterion = find(plan.criterion)
    of_sink = rows_at(states, call.starts) if sink is None else sink
    needed: dict[str, Any] = {}
    for need in criterion.needs:
        if need == "scores":
            needed[need] = scores
        elif need == "positions":
            needed[need] = call.row_positions(states.device)
        elif need == "layer":
            needed[need] = layer
        elif need == "seed":
            needed[need] = plan.seed
        else:
            assert parts is not None  # a layer that selects has its parts
            projected = parts.queries if need.endswith("queries") else lambda x: parts.keys_and_values(x)[0]
            needed[need] = projected(of_sink[:, None])[:, :, 0] if need.startswith("sink_") else projected(states)
    return criterion(states, of_sink, call.ranked_mask(states.device), **needed)
