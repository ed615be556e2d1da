"""Attention of selected queries to all keys.

A query at key ``p`` attends to the keys

    first <= j <= p   and   p - j < window   and   j < keys

with the logits ``s_j = scale * q k_j``, or ``softcap * tanh(s_j / softcap)``. With a sink logit ``z`` of its head,

    out = sum_j exp(s_j) v_j / (exp(z) + sum_j exp(s_j)),   lse = log(exp(z) + sum_j exp(s_j))

and without one, ``exp(z)`` is not there. A query that sees no key, and every query whose position is -1, gives exactly
0, and an lse of -inf, with a sink too.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels.reference.norms import wide
from orthorank_kernels.reference.rows import apply_rotary_at
from orthorank_kernels.reference.sequences import listed

Pair = tuple[Tensor, Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, places: Tensor, options: tuple[Any, ...], first: int = 0) -> Pair:
    """What queries ``[n, heads, head_dim]`` of one sequence give, and their lse ``[n, heads]``.

    Args:
        k, v: ``[keys, kv_heads, head_dim]``; each of their heads serves as many heads of q, one after the other.
        places: of the queries, counted like keys; -1 for none. options: scale, window, softcap and sinks.
    """
    scale, window, softcap, sinks = options
    dtype, group = wide(q.dtype), q.shape[1] // k.shape[1]
    keys, values = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
    out, lse = q.new_zeros(q.shape), torch.full(q.shape[:2], float("-inf"), dtype=dtype, device=q.device)
    for i, place in enumerate(places.tolist()):
        begin = max(0, first, 0 if window is None else place - window + 1)
        end = min(place + 1, k.shape[0])
        if begin >= end:
            continue
        logits = (keys[:, begin:end] @ q[i].to(dtype)[..., None])[..., 0] * scale  # [heads, keys]
        if softcap is not None:
            logits = (logits / softcap).tanh() * softcap
        lse[i] = logits.logsumexp(-1) if sinks is None else torch.logaddexp(logits.logsumexp(-1), sinks.to(dtype))
        weights = (logits - lse[i][:, None]).exp()
        out[i] = (weights[:, None] @ values[:, begin:end])[:, 0].to(q.dtype)
    return out, lse.float()


def rotated(q: Tensor, positions: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, *how: Any) -> Tensor:
    """Queries as `apply_rotary_at` leaves them, if there are tables; how: its two other options."""
    if cos is None or sin is None:
        return q
    if q.dim() == 4:
        return apply_rotary_at(q, cos, sin, positions, *how)
    return apply_rotary_at(q.transpose(0, 1)[None], cos[None], sin[None], positions[None], *how)[0].transpose(0, 1)


def sparse_query_attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *options: Any) -> Pair:
    """Batches: q ``[batch, heads, selected, head_dim]``, k and v ``[batch, kv_heads, keys, head_dim]``."""
    scale, window, starts, query_offset, softcap, sinks, return_lse, *rotary = options
    q, how = rotated(q, positions, *rotary), (scale, window, softcap, sinks)
    places = torch.where(positions < 0, -1, positions.long() + query_offset)
    firsts, rows = listed(starts, q.shape[0], 0), (x.transpose(1, 2) for x in (q, k, v))
    found = [attend(*of, how, first) for *of, first in zip(*rows, places, firsts, strict=True)]  # type: ignore[call-arg]
    if not found:
        return q.transpose(1, 2).contiguous().transpose(1, 2), q.new_empty(q.shape[:3] if return_lse else 0).float()
    out, lse = (torch.stack(parts).transpose(1, 2) for parts in zip(*found, strict=True))
    return out, lse.contiguous() if return_lse else lse.new_empty(0)


def sparse_query_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_selected: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> Pair:
    """Packed sequences: q ``[n, heads, head_dim]``, k and v ``[total, kv_heads, head_dim]``."""
    _, scale, window, softcap, sinks, return_lse, *rotary = options
    q, how = rotated(q, positions, *rotary), (scale, window, softcap, sinks)
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    for (a, b), (begin, end) in zip(pairwise(cu_selected.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        out[a:b], lse[a:b] = attend(q[a:b], k[begin:end], v[begin:end], positions[a:b], how)
    return out, lse if return_lse else lse.new_empty(0)


def sparse_query_attention_paged(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, positions: Tensor, cu_selected: Tensor, block_table: Tensor, *rest: Any
) -> Pair:
    """A paged cache: key j of sequence s is ``k_cache[block_table[t, j // size], j % size]``.

    t is ``table_rows[s]``, or s. Values of a scaled cache are multiplied by ``k_scale`` or ``v_scale``, and rounded.
    """
    seq_lens, table_rows, _, scale, window, softcap, sinks, k_scale, v_scale, return_lse, *rotary = rest
    q, size, how = rotated(q, positions, *rotary), k_cache.shape[1], (scale, window, softcap, sinks)
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:2], float("-inf"), dtype=torch.float32)
    tables = listed(table_rows, len(seq_lens), None)
    for s, ((begin, end), length) in enumerate(zip(pairwise(cu_selected.tolist()), seq_lens.tolist(), strict=True)):
        if begin < end:  # else the table may hold anything
            table = block_table[s if tables[s] is None else tables[s]].tolist()
            slots = [(table[j // size], j % size) for j in range(length)]
            k, v = (gathered(cache, slots, f, q) for cache, f in ((k_cache, k_scale), (v_cache, v_scale)))
            out[begin:end], lse[begin:end] = attend(q[begin:end], k, v, positions[begin:end], how)
    return out, lse if return_lse else lse.new_empty(0)


def gathered(cache: Tensor, slots: list[tuple[int, int]], factor: Tensor | None, q: Tensor) -> Tensor:
    """Keys or values in those slots of a cache, in the dtype of q: ``[slots, kv_heads, head_dim]``."""
    x = torch.stack([cache[page, slot] for page, slot in slots]) if slots else cache[0, :0]
    if factor is not None:
        x = x.to(wide(q.dtype)) * factor.to(wide(q.dtype))[:, None]
    return x.to(q.dtype)
