"""What only the paper's Table 3 needs, by the same hook as criteria of one's own (`orthorank.register_criterion`).

The criteria that OrthoRank is compared with are registered here, when `orthorank.hf.criteria` is imported.
"""

from typing import Any

import torch
from torch import Tensor

from orthorank.calls.context import ForwardContext
from orthorank.common.criteria import Criterion, add
from orthorank.common.errors import OrthoRankError
from orthorank_kernels import rms_norm_score, sparse_query_attention
from orthorank_kernels.hashing import random_scores


def inverse(x: Tensor, sink: Tensor, valid: Tensor, *, scores: Tensor) -> Tensor:
    """The least orthogonal tokens first, the paper's counter-example (Figure 4)."""
    return -scores


def at_random(x: Tensor, sink: Tensor, valid: Tensor, *, positions: Tensor, layer: int, seed: int) -> Tensor:
    """Any, by a hash of seed, layer and place in the row; what is not a number last, as by a score."""
    return torch.where(x.isnan().any(dim=-1), torch.nan, random_scores(positions, seed=seed, layer=layer))


def prenorm(x: Tensor, sink: Tensor, valid: Tensor) -> Tensor:
    """The paper's score on the states before the norm (Table 3: the stage)."""
    return rms_norm_score(x, None, 0.0, norm="identity", sink=sink).scores


add(Criterion("inverse", inverse, pointwise=True, needs=("scores",)))
add(Criterion("random", at_random, pointwise=True, needs=("positions", "layer", "seed")))
add(Criterion("prenorm", prenorm, pointwise=True, normed=False))


def sink_first(call: ForwardContext, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """``update_sink``: the ranks with every row's sink before all others, and that none ranks after all.

    How many tokens that makes, `ForwardContext.counts` knows.
    """
    columns = torch.arange(call.tokens, device=ranks.device)[None]
    is_sink = columns == (0 if call.sink_positions is None else call.sink_positions[:, None])
    nowhere = torch.full((call.batch,), -1, dtype=torch.int32, device=ranks.device)
    return torch.where(is_sink, -torch.inf, ranks), nowhere


def attention_among_selected(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    tokens: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention, each token at its own position, to the selected tokens up to it.

    Args:
        queries: ``[batch, heads, selected, head_dim]``, rotated; keys, values: ``[batch, kv_heads, selected,
            head_dim]``, those of the same tokens.
        positions: int32 ``[batch, selected]``, ascending, -1 past a row's count; tokens: how many there are in all.
        scale, window, softcap, sinks: as for `orthorank_kernels.sparse_query_attention`; ``window`` counts all tokens,
            the selected and the others.

    Returns:
        Like ``queries``; zeros where a position is -1.

    Example:
        >>> q, v = torch.zeros(1, 1, 3, 2), torch.tensor([[[[1.0, 0.0], [3.0, 0.0], [5.0, 0.0]]]])
        >>> positions = torch.tensor([[2, 4, 9]], dtype=torch.int32)
        >>> attention_among_selected(q, q, v, positions, tokens=10, scale=1.0)[0, 0, :, 0]
        tensor([1., 2., 3.])
        >>> attention_among_selected(q, q, v, positions, tokens=10, scale=1.0, window=3)[0, 0, :, 0]
        tensor([1., 2., 5.])
    """
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    if window is None or window >= tokens:
        index = torch.arange(positions.shape[1], dtype=torch.int32, device=positions.device)
        return sparse_query_attention(queries, keys, values, torch.where(positions < 0, -1, index), **options)
    return _masked_attention(queries, keys, values, _visible(positions, window), **options)


def _visible(positions: Tensor, window: int) -> Tensor:
    """Which token sees which: bool ``[batch, selected, selected]``."""
    at, key = positions[:, :, None], positions[:, None, :]
    return (key >= 0) & (key <= at) & (at - key < window)


def _masked_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a mask, in float32."""
    group = queries.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (keys, values))
    logits = scale * queries.float() @ keys.transpose(2, 3)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    hidden = ~visible[:, None]
    logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)
    if sinks is not None:
        logits = torch.cat([logits, sinks.float()[:, None, None].expand(*logits.shape[:3], 1)], dim=-1)
    weights = logits.softmax(dim=-1)[..., : keys.shape[2]].masked_fill(hidden, 0.0)
    return (weights @ values).to(queries.dtype)


def without_cache(cache: Any, use_cache: bool | None) -> bool:
    """``use_cache`` of a call with ``kv="selected"``: False, unless the caller asks for a cache.

    Raises:
        OrthoRankError: the caller does.
    """
    if cache is not None or use_cache:
        raise OrthoRankError(
            "kv is 'selected' and the call has a cache: tokens that are not selected have no keys and values in the "
            "selected layers, and a cache holds those of every token; pass use_cache=False (to generate(), too), or "
            "use a plan with kv='all'"
        )
    return False
