"""The scores that rank tokens: the paper's, and those it is compared with (paper, section 4.3, Table 3).

Every criterion is turned into a *rank*, float32 for each token, of which the smallest are selected: NaN after +inf and
the sink after everything. Whatever is done to a rank looks at one token, at the stored state of the sink and at the
token's place in the row alone, so no criterion depends on padding, on the batch or on how a prompt is cut into chunks.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from orthorank.hf import selection as choosing
from orthorank_kernels import rms_norm_score, rms_norm_select
from orthorank_kernels.hashing import random_scores

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig
    from orthorank.hf.calls import Call

# From which cosine to the sink's state on a token is a further sink. The states of sinks are alike, since a few massive
# channels make them, and all others are far away: SmolLM2-135M has 0.94 to 0.97 against at most 0.35.
SINK_COSINE = 0.75

# How `rms_norm_score` scores for each criterion whose score is one of its own.
SCORES = {"orthogonal": "inner", "inverse": "inner", "cosine": "cosine"}


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
    call: "Call",
    hidden_states: Tensor,
    norm: dict[str, Any],
    sink: Tensor | None,
    normed: Tensor | None = None,
) -> Chosen:
    """The input norm of all tokens, and the tokens that ``plan`` selects in ``layer``.

    Args:
        plan: what ranks tokens, and which ranks are selected; call: padding, and where the sinks are.
        hidden_states: ``[batch, tokens, hidden]``; norm: the input norm, as `rms_norm_score` takes it (weight, eps).
        sink: the sinks' states ``[batch, hidden]`` where the rows began in an earlier call, `scored_states` of then;
            None: the rows begin in this call.
        normed: the input norm of all tokens, where its module was called; ``norm`` is the identity then.
    """
    if is_fused(plan) and choosing.is_plain(plan, call):
        chosen: Any = rms_norm_select(
            hidden_states if normed is None else normed,
            **norm,
            **choosing.request(plan, layer, call),
            score=SCORES[plan.criterion],
            sink=sink,
            starts=call.starts,
            lengths=call.lengths,
            sink_positions=call.sink_positions,
            workspace=call.workspace,
            copy_input=normed is None,
        )
        if normed is not None:
            return Chosen(normed, chosen.positions, hidden_states.clone(), chosen.counts)
        return Chosen(chosen.normed, chosen.positions, chosen.residual, chosen.counts)
    normed, ranks, updated = norm_and_rank(plan, layer, call, hidden_states, norm, sink, normed)
    sinks = call.sink_positions
    if plan.update_sink:
        ranks = torch.where(is_sink(call, ranks.device), -torch.inf, ranks)
        sinks = torch.full((call.batch,), -1, dtype=torch.int32, device=ranks.device)  # none that ranks after all
    positions, counts = choosing.pick(plan, layer, call, ranks, sinks)
    return Chosen(normed, positions, updated, counts)


def norm_and_rank(
    plan: "OrthoRankConfig",
    layer: int,
    call: "Call",
    hidden_states: Tensor,
    norm: dict[str, Any],
    sink: Tensor | None = None,
    given: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The input norm of all tokens, their ranks, and a copy of ``hidden_states``; arguments as for `norm_and_select`.

    The ranks of the sinks mean nothing. ``given`` is its ``normed``.
    """
    own = sink if plan.criterion in SCORES else None  # what the others keep of the sink is no state for this score
    scored: Any = rms_norm_score(
        hidden_states if given is None else given,
        **norm,
        score=SCORES.get(plan.criterion, "inner"),
        sink=own,
        starts=call.starts,
        lengths=call.lengths,
        copy_input=given is None,
    )
    normed = scored.normed if given is None else given
    ranks = ranks_of(plan, layer, call, scored_states(plan, hidden_states, normed), scored.scores, sink)
    return normed, ranks, scored.residual if given is None else hidden_states.clone()


def is_fused(plan: "OrthoRankConfig") -> bool:
    """Whether one launch norms, scores and selects for ``plan``."""
    return plan.criterion in ("orthogonal", "cosine") and not plan.update_sink and plan.sinks == "first"


def scored_states(plan: "OrthoRankConfig", hidden_states: Tensor, normed: Tensor) -> Tensor:
    """The states that tokens are compared by, and of which the sinks' are kept: Table 3 calls it the stage."""
    return hidden_states if plan.criterion == "prenorm" else normed


def ranks_of(
    plan: "OrthoRankConfig", layer: int, call: "Call", states: Tensor, scores: Tensor, sink: Tensor | None
) -> Tensor:
    """The rank of each token, float32 ``[batch, tokens]``; the sink's means nothing.

    Args:
        states: `scored_states`; scores: those of the normed states; sink: as for `norm_and_select`.
    """
    ranks = scores
    if plan.criterion == "inverse":
        ranks = -scores
    elif plan.criterion == "random":
        drawn = random_scores(call.row_positions(states.device), seed=plan.seed, layer=layer)
        ranks = torch.where(states.isnan().any(dim=-1), torch.nan, drawn)
    elif plan.criterion == "prenorm":
        ranks = _scores(states, "inner", call, sink)
    if plan.sinks == "auto":
        ranks = torch.where(_scores(states, "cosine", call, sink) >= SINK_COSINE, torch.inf, ranks)
    return ranks


def is_sink(call: "Call", device: torch.device) -> Tensor:
    """Which tokens are their row's first one: bool, ``[batch or 1, tokens]``."""
    columns = torch.arange(call.tokens, device=device)[None]
    return columns == (0 if call.sink_positions is None else call.sink_positions[:, None])


def _scores(states: Tensor, score: str, call: "Call", sink: Tensor | None) -> Tensor:
    """The scores of ``states`` as they are."""
    return rms_norm_score(states, None, 0.0, norm="identity", score=score, sink=sink, starts=call.starts).scores
