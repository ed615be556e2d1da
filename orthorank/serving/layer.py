"""The selected layer over a packed batch (paper, Algorithm 1), whatever the stack's projections and cache are.

    h [tokens, hidden] + r --rms_norm_score--> x, scores, r'
    x --keys_and_values, store--> the stack's cache, all tokens
    scores --choose--> rows, positions;   x[rows] --queries--> Q --attend--> o --project--> a
    r', rows, a --gather_add_rms_norm--> s = r'[rows] + a, y = norm(s) --feed_forward--> m
    out_hidden = m at the rows, else 0;   out_residual = s at the rows, else r'

Stacks keep the residual stream in two parts, what the last layer added (``hidden``) and what was there before
(``residual``), and add them in the next norm. A token that is not selected adds nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from orthorank.common.criteria import BUILT_IN, FUSED, find
from orthorank.serving.selection import PackedRows, choose_below, choose_share
from orthorank.serving.steps import Step
from orthorank_kernels import gather_add_rms_norm, rms_norm_score, scatter_rows_

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig


@dataclass(frozen=True)
class RMSNorm:
    """An RMSNorm's weight ``[hidden]`` and what is added to the mean square."""

    weight: Tensor
    eps: float


class PackedParts(ABC):
    """What a stack brings: the modules of one layer and its cache. Shapes are those of one rank."""

    @property
    @abstractmethod
    def norm_in(self) -> RMSNorm:
        """The norm before attention."""

    @property
    @abstractmethod
    def norm_post(self) -> RMSNorm:
        """The norm before the MLP."""

    @abstractmethod
    def sinks(self, step: Step) -> Tensor:
        """The sink's normed state of each request, ``[requests, hidden]``."""

    @abstractmethod
    def project(self, normed: Tensor) -> None:
        """Project ``normed`` ``[tokens, hidden]`` to keys and values, rotate the keys, write both to the cache."""

    @abstractmethod
    def attend(self, normed: Tensor, chosen: PackedRows) -> Tensor:
        """Queries of the chosen rows of ``normed``, their attention to the cache, ``[n, hidden]`` projected back."""

    @abstractmethod
    def feed_forward(self, fed: Tensor) -> Tensor:
        """The MLP, of ``[n, hidden]``."""

    def agree(self, scores: Tensor) -> Tensor:
        """The scores that all ranks of a layer select by; by themselves all ranks have the same hidden states."""
        return scores


def packed_forward(
    parts: PackedParts,
    plan: "OrthoRankConfig",
    layer: int,
    step: Step,
    hidden: Tensor,
    residual: Tensor,
    out_hidden: Tensor,
    out_residual: Tensor,
    *,
    read_count: bool = True,
) -> None:
    """One layer in which only the chosen tokens are updated.

    Args:
        parts: the layer; plan: how it selects; layer: its number in the plan; step: what is in the batch.
        hidden, residual: ``[tokens or more, hidden]``, the residual stream is their sum. Not written to.
        out_hidden, out_residual: where the result goes, contiguous, shape and dtype of ``hidden``.
        read_count: see `choose_below`; only ``select="threshold"`` asks.

    Raises:
        OrthoRankError: the layer does not select, or the step was made by another plan.
    """
    if step.tokens == 0:  # padding alone: nothing to norm by, nothing to cache
        out_hidden.zero_()
        torch.add(hidden, residual, out=out_residual)
        return
    norm, sinks = parts.norm_in, parts.sinks(step)
    normed = torch.empty_like(out_hidden)
    scores = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    rms_norm_score(
        hidden,
        norm.weight,
        norm.eps,
        residual=residual,
        score=FUSED.get(plan.criterion, "inner"),
        sink=sinks,
        cu_seqlens=step.cu_tokens,
        out=(normed, scores, out_residual),
    )
    scores = parts.agree(scores)
    ranks = scores if plan.criterion in FUSED else _ranks(plan, layer, step, normed, scores, sinks)
    if plan.criterion not in BUILT_IN:
        ranks = parts.agree(ranks)
    if plan.select == "threshold":
        chosen = choose_below(step, ranks, plan.thresholds[layer], read_count=read_count)
    else:
        chosen = choose_share(step, ranks, plan.ratio(layer))
    parts.project(normed)
    out_hidden.zero_()
    if chosen.rows.shape[0] == 0:
        return
    post = parts.norm_post
    added = gather_add_rms_norm(out_residual, chosen.rows, parts.attend(normed, chosen), post.weight, post.eps)
    scatter_rows_(out_residual, chosen.rows, added.residual)
    scatter_rows_(out_hidden, chosen.rows, parts.feed_forward(added.normed))


def _ranks(plan: "OrthoRankConfig", layer: int, step: Step, normed: Tensor, scores: Tensor, sinks: Tensor) -> Tensor:
    """What a registered criterion gives: float32 ``[tokens or more]``. It is pointwise, so each token is a row."""
    criterion, given = find(plan.criterion), {"scores": scores[:, None], "layer": layer, "seed": plan.seed}
    token = torch.arange(normed.shape[0], dtype=torch.int32, device=normed.device)
    request = torch.searchsorted(step.cu_tokens[1:].contiguous(), token, right=True).clamp(max=step.requests - 1)
    valid = (token < step.tokens)[:, None]
    needed = {need: given[need] for need in criterion.needs}
    return criterion(normed[:, None], sinks.index_select(0, request), valid, **needed)[:, 0]
