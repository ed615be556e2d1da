"""Norm, sink score, and the k tokens that score least, or all below a threshold, in the order of their positions.

h_i      = x_i + residual_i
normed_i = norm(h_i) * weight + bias
score_i  = |<sink, normed_i>|, or |cos(sink, normed_i)|
"""

import math
from typing import Any

import torch
from torch import Tensor

from orthorank_kernels.reference.norms import normalise, wide
from orthorank_kernels.reference.sequences import listed, valid_ranges

SHORTEST = 1e-8  # what lengths are clamped to in a cosine, as in torch.nn.functional.cosine_similarity


def rms_norm_score(
    hidden_states: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None, norm: str, bias: Tensor | None,
    weight_offset: float, score: str, sink: Tensor | None, starts: Tensor | None, cu_seqlens: Tensor | None,
    write_norm: bool, copy_input: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``normed``, ``scores`` and the summed (or copied) states; an empty tensor for what is not asked for."""
    h = hidden_states if residual is None else hidden_states + residual
    normed = h if norm == "identity" else normalise(h, weight, eps, norm, bias, weight_offset)
    values = normed.to(wide(h.dtype))  # of the rounded norm, which is what projections and a stored sink see
    scores = values.new_zeros(h.shape[:-1])
    for number, (begin, end) in enumerate(valid_ranges(h.shape[:2], starts, None, cu_seqlens)):
        of, first = (slice(begin, end), 0) if cu_seqlens is not None else (number, min(begin, h.shape[1] - 1))
        if values[of].numel() == 0:
            continue
        vector = values[of][first] if sink is None else (sink if sink.dim() == 1 else sink[number]).to(values.dtype)
        scores[of] = (values[of] @ vector).abs()
        if score == "cosine":
            scores[of] /= vector.norm().clamp(min=SHORTEST) * values[of].norm(dim=-1).clamp(min=SHORTEST)
    normed = normed.contiguous() if write_norm and norm != "identity" else h.new_empty(0)
    wanted = residual is not None or copy_input
    return normed, scores, h.clone(memory_format=torch.contiguous_format) if wanted else h.new_empty(0)


def select_tokens(
    scores: Tensor, k: int | None, seq_k: Tensor | None, threshold: float | None, seq_threshold: Tensor | None,
    width: int, starts: Tensor | None, lengths: Tensor | None, sink_positions: Tensor | None,
    cu_seqlens: Tensor | None, position_offsets: Tensor | None, keep_last: int, largest: bool = False,
    relative: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``positions``, ``counts``, ``rows`` and ``cu_selected``; the last two are empty in the batch layout.

    ``width`` bounds a row's tokens, or those of all sequences together.
    """
    packed, values = cu_seqlens is not None, -scores.detach().float() if largest else scores.detach().float()
    ranges = valid_ranges(scores.shape, starts, lengths, cu_seqlens)
    count = len(ranges)
    bound = None if threshold is None else torch.tensor(threshold, dtype=torch.float64).float().item()
    bounds, wanted = listed(seq_threshold, count, bound), listed(seq_k, count, k)
    sinks, offsets = listed(sink_positions, count, None), listed(position_offsets, count, 0)
    room, picked = width, []
    for number, ((begin, end), sink) in enumerate(zip(ranges, sinks, strict=True)):
        row = values.tolist() if packed else values[number].tolist()
        if packed:  # counted from the sequence's first token; a later chunk holds no sink of its own
            sink = begin + sink if sink is not None else begin if offsets[number] == 0 else -1
        elif sink is None:
            sink = -1 if largest else begin
        if bounds[number] is not None:
            tokens = below(row, begin, end, sink, keep_last, bounds[number])[:room]
        else:
            most = max(0, min(wanted[number], room, math.inf if k is None else k))
            tokens = smallest(row, begin, end, sink, keep_last, int(most))
        picked.append(tokens)
        room -= len(tokens) if packed else 0

    def integers(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=scores.device)

    counts = integers([len(tokens) for tokens in picked])
    zeros = [begin - offset if packed or relative else 0 for (begin, _), offset in zip(ranges, offsets, strict=True)]
    places = [[t - zero for t in tokens] for tokens, zero in zip(picked, zeros, strict=True)]
    if not packed:
        positions = [of_one + [-1] * (width - len(of_one)) for of_one in places]
        return integers(positions).view(count, width), counts, integers([]), integers([])
    ends = [sum(map(len, picked[:number])) for number in range(count + 1)]
    missing = [-1] * (width - ends[-1])
    places_of_all, rows = ([t for tokens in of_each for t in tokens] + missing for of_each in (places, picked))
    return integers(places_of_all), counts, integers(rows), integers(ends)


def smallest(row: list[float], begin: int, end: int, sink: int, keep_last: int, count: int) -> list[int]:
    """The tokens whose turn comes first: the last ``keep_last`` from the end, others by score, NaN, the sink."""

    def turn(t: int) -> tuple[int, float, int]:
        if t == sink:
            return 3, 0.0, t
        if t >= end - keep_last:
            return 0, -t, t
        return (2, 0.0, t) if math.isnan(row[t]) else (1, row[t], t)

    return sorted(sorted(range(begin, end), key=turn)[:count])


def below(row: list[float], begin: int, end: int, sink: int, keep_last: int, threshold: float) -> list[int]:
    """The tokens that score less than a threshold, and the last ``keep_last``; never the sink."""
    return [t for t in range(begin, end) if t != sink and (row[t] < threshold or t >= end - keep_last)]


def rms_norm_select(hidden_states: Tensor, weight: Tensor | None, eps: float, *rest: Any) -> tuple[Tensor, ...]:
    """The two, one after the other."""
    *norm_and_score, write_norm, copy_input = rest[:8]
    *choice, _ = rest[8:]  # the workspace is the kernel's
    states = (*norm_and_score, choice[5], choice[8], write_norm, copy_input)  # with starts and cu_seqlens
    found = rms_norm_score(hidden_states, weight, eps, *states)
    return *found, *select_tokens(found[1], *choice)
