"""What every op computes, in float64, one token at a time: the definition in the docstrings, sharing no code with them.

Each takes what the public function takes and returns what it returns, without empty fields and in float64.
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.orthorank_kernels.attention_cases import stated
from tests.orthorank_kernels.selections import by_filter, by_sort


def listed(x: Tensor | None, count: int, otherwise: Any) -> list[Any]:
    return [otherwise] * count if x is None else x.tolist()


def gather_rows(x: Tensor, positions: Tensor, **_: Any) -> Tensor:
    if x.dim() == 2:
        return gather_rows(x[None], positions[None])[0]
    out = torch.zeros(*positions.shape, x.shape[2], dtype=torch.float64)
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if p >= 0:
                out[b, i] = x[b, p].double()
    return out


def scatter_rows_(out: Tensor, positions: Tensor, rows: Tensor, **_: Any) -> Tensor:
    if out.dim() == 2:
        return scatter_rows_(out[None], positions[None], rows[None])[0]
    result = out.detach().double().clone()
    for b, row in enumerate(positions.tolist()):
        for i, p in enumerate(row):
            if p >= 0:
                result[b, p] = rows[b, i].double()
    return result


def scatter_add_rows_(
    out: Tensor, positions: Tensor, rows: Tensor, residual: Tensor, *, scale: float = 1.0, **_: Any
) -> Tensor:
    return scatter_rows_(out, positions, residual.double() + scale * rows.double())


def silu_and_mul(gate: Tensor, up: Tensor | None = None, *, positions: Tensor | None = None, **_: Any) -> Tensor:
    if up is None:
        gate, up = gate.chunk(2, -1)
    gate, up = gate.double(), up.double()
    out = gate / (1 + (-gate).exp()) * up
    return out if positions is None else out.masked_fill((positions < 0)[..., None], 0)


def apply_rotary_at(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    **_: Any,
) -> Tensor:
    if x.dim() == 3:
        of = None if positions is None else positions[None]
        whole = (x.transpose(0, 1)[None], cos[None], sin[None], of)
        return apply_rotary_at(*whole, interleaved=interleaved, rotary_dim=rotary_dim)[0].transpose(0, 1)
    half = (x.shape[-1] if rotary_dim is None else rotary_dim) // 2
    out = x.double().clone()
    for b in range(x.shape[0]):
        for i in range(x.shape[2]):
            p = i if positions is None else int(positions[b, i])
            if p < 0:
                out[b, :, i] = 0
                continue
            for j in range(half):
                c, s = (float(t[b if t.shape[0] > 1 else 0, p, j]) for t in (cos, sin))
                one, two = (2 * j, 2 * j + 1) if interleaved else (j, j + half)
                first, second = x[b, :, i, one].double(), x[b, :, i, two].double()
                out[b, :, i, one], out[b, :, i, two] = first * c - second * s, second * c + first * s
    return out


def apply_rotary_and_cache_(
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    **how: Any,
) -> tuple[Tensor, Tensor]:
    found = k_cache.detach().double().clone(), v_cache.detach().double().clone()
    blocks, size = k_cache.shape[:2]
    there = {slot: (slot // size, slot % size) for slot in range(blocks * size)}
    for token, slot in enumerate(slots.tolist()):
        row = token if positions is None else int(positions[token])
        if slot in there and row >= 0:
            turned = apply_rotary_at(keys[token][None], cos[row][None], sin[row][None], **how)
            found[0][there[slot]], found[1][there[slot]] = turned[0], values[token].double()
    return found


def add_low_rank(
    hidden_states: Tensor,
    low: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> Tensor:
    out = hidden_states.double().clone()
    shift = 0 if bias is None else bias.double()

    def change(token: Any) -> None:
        out[token] = out[token] + up.double() @ low[token].double() + shift

    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        for (begin, end), sink in zip(pairwise(ends), listed(sink_positions, len(ends) - 1, 0), strict=True):
            for token in range(begin, end):
                if sink < 0 or token != begin + sink:
                    change(token)
        return out
    batch, tokens = hidden_states.shape[:2]
    of_rows = listed(starts, batch, 0), listed(lengths, batch, tokens), listed(sink_positions, batch, None)
    for b, (start, length, sink) in enumerate(zip(*of_rows, strict=True)):
        start = min(max(start, 0), tokens)
        for t in range(start, min(tokens, start + length)):
            if t != (start if sink is None else sink):
                change((b, t))
    return out


def normed_of(
    h: Tensor, weight: Tensor | None, eps: float, norm: str, bias: Tensor | None, weight_offset: float
) -> Tensor:
    h = h.double()
    if norm == "identity":
        return h
    h = h - h.mean(-1, keepdim=True) if norm == "layer" else h
    h = h / (h.square().mean(-1, keepdim=True) + eps).sqrt()
    h = h if weight is None else h * (weight.double() + weight_offset)
    return h if bias is None else h + bias.double()


def gather_add_rms_norm(
    hidden_states: Tensor,
    positions: Tensor,
    addend: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    scale: float = 1.0,
    addend_weight: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    added = addend.double()
    if addend_weight is not None:
        added = normed_of(added, addend_weight, eps, "rms", None, weight_offset)
    missing = (positions < 0)[..., None]
    residual = (gather_rows(hidden_states, positions) + scale * added).masked_fill(missing, 0)
    normed = normed_of(residual, weight, eps, norm, bias, weight_offset).masked_fill(missing, 0)
    return residual, residual if norm == "identity" else normed


def rms_norm_score(
    hidden_states: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    residual: Tensor | None = None,
    norm: str = "rms",
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    score: str = "inner",
    sink: Tensor | None = None,
    starts: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """``normed`` and ``scores``; scores of tokens that no sequence owns are NaN: they mean nothing."""
    h = hidden_states.double() if residual is None else hidden_states.double() + residual.double()
    normed = normed_of(h, weight, eps, norm, bias, weight_offset)
    scores = torch.full(h.shape[:-1], torch.nan, dtype=torch.float64)

    def scored(rows: Tensor, vector: Tensor) -> Tensor:
        products = (rows * vector.double()).sum(-1).abs()
        if score == "inner":
            return products
        return products / (vector.double().norm().clamp(min=1e-8) * rows.norm(dim=-1).clamp(min=1e-8))

    if cu_seqlens is None:
        for b, start in enumerate(listed(starts, h.shape[0], 0)):
            if h.shape[1]:
                own = normed[b, min(max(start, 0), h.shape[1] - 1)]
                scores[b] = scored(normed[b], own if sink is None else sink if sink.dim() == 1 else sink[b])
        return normed, scores
    ends = cu_seqlens.tolist()
    for s, (begin, end) in enumerate(pairwise(ends)):
        if end > begin:
            own = normed[begin]
            vector = own if sink is None else sink if sink.dim() == 1 else sink[s]
            scores[begin:end] = scored(normed[begin:end], vector)
    return normed, scores


def select_tokens(
    scores: Tensor,
    k: int | Tensor | None = None,
    *,
    threshold: float | Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    position_offsets: Tensor | None = None,
    keep_last: int = 0,
    max_selected: int | None = None,
    largest: bool = False,
    relative: bool = False,
    **_: Any,
) -> list[list[int]]:
    """The positions of each row or sequence, as many as there is room for."""
    scores = -scores if largest else scores
    ends = None if cu_seqlens is None else cu_seqlens.tolist()
    packed = [scores[a:b].tolist() for a, b in pairwise(ends)] if ends else None
    rows = scores.tolist() if packed is None and ends is None else packed or []
    count, tokens = len(rows), scores.shape[-1]
    room = max_selected if max_selected is not None else k if isinstance(k, int) and ends is None else tokens
    found, offsets = [], listed(position_offsets, count, 0)
    of_rows = zip(
        rows,
        k.tolist() if isinstance(k, Tensor) else [k] * count,
        threshold.tolist() if isinstance(threshold, Tensor) else [threshold] * count,
        listed(starts, count, 0),
        listed(lengths, count, None),
        listed(sink_positions, count, None),
        offsets,
        strict=True,
    )
    for row, wanted, bound, given, length, place, offset in of_rows:
        start = min(max(given, 0), len(row))
        length = len(row) if length is None else max(length, 0)
        sink = place if place is not None else start if offset == 0 and not largest else -1
        if bound is not None:
            bound = float(torch.tensor(float(bound)).float())
            picked = by_filter(row, bound, start, length, sink, keep_last)[:room]
        else:
            most = min(max(wanted, 0), room, max(0, min(len(row), start + length) - start))
            picked = by_sort(row, most, start, length, sink, keep_last)
        found.append([p + offset - (start if relative else 0) for p in picked])
        room -= len(picked) if ends is not None else 0
    return found


def attention_options(options: dict[str, Any]) -> dict[str, Any]:
    return {n: v for n, v in options.items() if n in ("scale", "window", "softcap", "sinks")}


def turned(q: Tensor, positions: Tensor, options: dict[str, Any]) -> Tensor:
    """The queries by the angles of their positions, if there are tables."""
    if options.get("rotary_cos") is None:
        return q
    how = {"interleaved": options.get("rotary_interleaved", False), "rotary_dim": options.get("rotary_dim")}
    return apply_rotary_at(q, options["rotary_cos"], options["rotary_sin"], positions, **how)


def sparse_query_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *, starts: Tensor | None = None, query_offset: int = 0, **o: Any
) -> Tensor:
    q, out = turned(q, positions, o), torch.zeros(q.shape, dtype=torch.float64)
    for b, start in enumerate(listed(starts, q.shape[0], 0)):
        for i, p in enumerate(positions[b].tolist()):
            if p >= 0:
                keys, values = k[b].transpose(0, 1), v[b].transpose(0, 1)
                place = p + query_offset
                out[b, :, i] = stated(q[b, :, i], keys, values, place, start=max(start, 0), **attention_options(o))[0]
    return out


def sparse_query_attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, cu_selected: Tensor, cu_seqlens_k: Tensor, **o: Any
) -> Tensor:
    q, out = turned(q, positions, o), torch.zeros(q.shape, dtype=torch.float64)
    queries, keys = cu_selected.tolist(), cu_seqlens_k.tolist()
    for s in range(len(queries) - 1):
        own = slice(keys[s], keys[s + 1])
        for i in range(queries[s], queries[s + 1]):
            out[i] = stated(q[i], k[own], v[own], int(positions[i]), **attention_options(o))[0]
    return out


def sparse_query_attention_paged(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    cu_selected: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    *,
    table_rows: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    **o: Any,
) -> Tensor:
    dtype, q, out = q.dtype, turned(q, positions, o), torch.zeros(q.shape, dtype=torch.float64)
    size, queries = k_cache.shape[1], cu_selected.tolist()

    def key(cache: Tensor, factor: Tensor | None, row: int, j: int) -> Tensor:
        x = cache[int(block_table[row, j // size]), j % size].float()
        return (x if factor is None else x * factor.reshape(-1, 1)).to(dtype)

    for s, (length, row) in enumerate(zip(seq_lens.tolist(), listed(table_rows, len(queries) - 1, None), strict=True)):
        row = s if row is None else row
        for i in range(queries[s], queries[s + 1]):
            seen = list(range(min(length, int(positions[i]) + 1)))
            if seen and o.get("window") is not None:
                seen = [j for j in seen if int(positions[i]) - j < o["window"]]
            if seen:
                k, v = (
                    torch.stack([key(c, f, row, j) for j in seen]) for c, f in ((k_cache, k_scale), (v_cache, v_scale))
                )
                out[i] = stated(q[i], k, v, len(seen) - 1, **{**attention_options(o), "window": None})[0]
    return out
