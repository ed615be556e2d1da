"""The selected layer over a packed batch (paper, Algorithm 1), whatever the stack's projections and cache are.

    h [tokens, hidden] + r --rms_norm_select--> x, r', rows, positions
    x --keys_and_values, store--> the stack's cache, all tokens
    x[rows] --queries--> Q --attend--> o --project--> a
    r', rows, a --gather_add_rms_norm--> s = r'[rows] + a, y = norm(s) --feed_forward--> m
    out_hidden = m at the rows, else 0;   out_residual = s at the rows, else r', or r' + up (down x) + bias

The last where the plan is corrected, and not for sinks. Of a removed layer (ratio 0) that is all that is left.

Stacks keep the residual stream in two parts, what the last layer added (``hidden``) and what was there before
(``residual``), and add them in the next norm. A token that is not selected adds nothing.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from orthorank.common.criteria import FUSED, find
from orthorank.common.errors import OrthoRankError
from orthorank.packed.selection import PackedRows, choose, request_of, rows_of
from orthorank.packed.steps import Step
from orthorank_kernels import add_low_rank, gather_add_rms_norm, rms_norm_score, rms_norm_select, scatter_rows_

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig
    from orthorank.correction import LayerMap


@dataclass(frozen=True)
class RMSNorm:
    """An RMSNorm.

    Args:
        weight: ``[hidden]``. eps: added to the mean square.
    """

    weight: Tensor
    eps: float


class PackedParts(ABC):
    """What a stack brings: the modules of one layer and its cache. Shapes are those of one rank."""

    @property
    @abstractmethod
    def input_norm(self) -> RMSNorm:
        """The norm before attention."""

    @property
    @abstractmethod
    def pre_mlp_norm(self) -> RMSNorm:
        """The norm before the MLP."""

    @abstractmethod
    def sinks(self, step: Step) -> Tensor:
        """The sink's normed state for each segment, ``[segments, hidden]``: those of `Step.sink_slots`."""

    @abstractmethod
    def project(self, normed: Tensor) -> Tensor | None:
        """Project ``normed`` ``[tokens, hidden]`` to keys and values, rotate the keys, write both to the cache.

        Returns:
            ``[tokens, rank]``, what the layer's map makes of ``normed`` at first, where its ``down`` is further rows of
            the weight that gives keys and values; None: it is a product of its own.
        """

    @abstractmethod
    def attend(self, normed: Tensor, chosen: PackedRows) -> Tensor:
        """Queries of the chosen rows of ``normed``, their attention to the cache, ``[n, hidden]`` projected back."""

    @abstractmethod
    def feed_forward(self, mlp_in: Tensor) -> Tensor:
        """The MLP, of ``[n, hidden]``."""

    def agree(self, scores: Tensor) -> Tensor:
        """The scores that all ranks of a layer select by; by themselves all ranks have the same hidden states."""
        return scores

    @property
    def agrees(self) -> bool:
        """Whether `agree` may give others than it is given. Where it does not, one launch norms, scores and selects."""
        return type(self).agree is not PackedParts.agree


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
    layer_map: "LayerMap | None" = None,
    read_count: bool = True,
) -> None:
    """One layer in which only the chosen tokens are updated, and others are corrected if the plan has a map for it.

    A corrected layer with ratio 0 runs here, too, in every step, those of generated tokens alone included: it has no
    keys and values, and corrects every token but the sinks.

    Args:
        parts: the layer; plan: how it selects; layer: its number in the plan; step: what is in the batch.
        hidden, residual: ``[tokens or more, hidden]``, the residual stream is their sum. Not written to.
        out_hidden, out_residual: where the result goes, contiguous, shape and dtype of ``hidden``.
        layer_map: the plan's for this layer (`orthorank.packed.map_of`), in the dtype of ``hidden``.
        read_count: see `orthorank.packed.selection.rows_of`; only ``select="threshold"`` asks.

    Raises:
        OrthoRankError: the layer does not select, the step was made by another plan, or the plan has a map for the
            layer and none is given.
    """
    _check_map(plan, layer, layer_map)
    if step.tokens == 0:  # padding alone: nothing to norm by, nothing to cache
        out_hidden.zero_()
        torch.add(hidden, residual, out=out_residual)
        return
    normed = torch.empty_like(out_hidden)
    if layer_map is not None and plan.ratio(layer) == 0:
        norm, scores = parts.input_norm, torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        out = normed, scores, out_residual
        rms_norm_score(hidden, norm.weight, norm.eps, residual=residual, cu_seqlens=step.cu_segments, out=out)
        out_hidden.zero_()
        _correct(layer_map, step, out_residual, normed, None)
        return
    chosen = _norm_and_select(parts, plan, layer, step, hidden, residual, (normed, out_residual), read_count)
    low = parts.project(normed)
    out_hidden.zero_()
    post, added = parts.pre_mlp_norm, None
    if chosen.rows.shape[0]:
        added = gather_add_rms_norm(out_residual, chosen.rows, parts.attend(normed, chosen), post.weight, post.eps)
    if layer_map is not None:  # in place, now that the chosen rows are read
        _correct(layer_map, step, out_residual, normed, low)
    if added is not None:
        scatter_rows_(out_residual, chosen.rows, added.residual)
        scatter_rows_(out_hidden, chosen.rows, parts.feed_forward(added.normed))


def _check_map(plan: "OrthoRankConfig", layer: int, layer_map: "LayerMap | None") -> None:
    has = plan.correction is not None and layer in plan.correction.maps
    if has and layer_map is None:
        raise OrthoRankError(
            f"the plan corrects layer {layer}, and no map was given; pass layer_map=orthorank.packed.map_of(plan, "
            f"{layer}, device, dtype), made once, or set the plan's correction to None to follow it uncorrected"
        )
    if layer_map is not None and not has:
        raise OrthoRankError(f"a map was given for layer {layer}, which the plan does not correct; leave layer_map out")


def _correct(layer_map: "LayerMap", step: Step, stream: Tensor, normed: Tensor, low: Tensor | None) -> None:
    """Add the map to every token of ``stream`` but the requests' first ones, in place, those of prompts that no layer
    selects from too. ``low`` is what `PackedParts.project` gave.
    """
    low = linear(normed, layer_map.down) if low is None else low
    states = stream[: low.shape[0]]
    where: dict[str, Any] = {"cu_seqlens": step.cu_segments, "sink_positions": step.first_positions}
    add_low_rank(states, low, layer_map.up, layer_map.bias, **where, out=states)


def _norm_and_select(
    parts: PackedParts,
    plan: "OrthoRankConfig",
    layer: int,
    step: Step,
    hidden: Tensor,
    residual: Tensor,
    out: tuple[Tensor, Tensor],
    read_count: bool,
) -> PackedRows:
    """The chosen rows; the norm of all tokens and the sum that was normed go to ``out``."""
    norm, sinks, request = parts.input_norm, parts.sinks(step), request_of(step, plan, layer)
    how: dict[str, Any] = {"residual": residual, "score": FUSED.get(plan.criterion, "inner"), "sink": sinks}
    normed, summed = out
    scores = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    if plan.criterion in FUSED and not parts.agrees and not step.forced.shape[0]:
        # positions, counts, rows and where each segment's begin
        sizes = request["max_selected"], len(sinks), request["max_selected"], len(sinks) + 1
        room = [torch.empty(size, dtype=torch.int32, device=hidden.device) for size in sizes]
        into = (normed, scores, summed, *room)
        picked = rms_norm_select(hidden, norm.weight, norm.eps, **request, **how, workspace=step.workspace, out=into)
        return rows_of(step, picked, request, read_count=read_count)
    rms_norm_score(hidden, norm.weight, norm.eps, **how, cu_seqlens=step.cu_segments, out=(normed, scores, summed))
    ranks = scores = parts.agree(scores)
    if plan.criterion == "inverse":  # of the scores alone: no token needs its sink
        ranks = -scores
    elif plan.criterion not in FUSED:
        ranks = parts.agree(_ranks(plan, layer, step, normed, scores, sinks))
    return choose(step, ranks, request, read_count=read_count)


def _ranks(plan: "OrthoRankConfig", layer: int, step: Step, normed: Tensor, scores: Tensor, sinks: Tensor) -> Tensor:
    """What a registered criterion gives: float32 ``[tokens or more]``. It is pointwise, so each token is a row."""
    criterion, given = find(plan.criterion), {"scores": scores[:, None], "layer": layer, "seed": plan.seed}
    token = torch.arange(normed.shape[0], dtype=torch.int32, device=normed.device)
    segment = torch.searchsorted(step.cu_segments[1:].contiguous(), token, right=True).clamp(max=len(sinks) - 1)
    valid = (token < step.tokens)[:, None]
    needed = {need: given[need] for need in criterion.needs}
    ranks = criterion(normed[:, None], sinks.index_select(0, segment), valid, **needed)[:, 0]
    return ranks.clone() if step.forced.shape[0] else ranks  # they are written to, and may be states or kept
