"""Which tokens a layer processes: the most orthogonal ones, or those below a threshold, in position order."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks
from orthorank_kernels import dispatch
from orthorank_kernels import op as _library
from orthorank_kernels.counts import check_keep_last
from orthorank_kernels.launch_plan import planned
from orthorank_kernels.layout import selection_outputs
from orthorank_kernels.pytorch import selection as pytorch
from orthorank_kernels.reference import selection as reference

MAX_TOKENS = 2**30
MOST_POSITIONS = 2**31  # of int32
ROUNDS_TO_INFINITY = 2.0**128 - 2.0**103  # in float32


class Selection(NamedTuple):
    """Result of `select_tokens`; ``rows`` and ``cu_selected`` are None in the batch layout."""

    positions: Tensor
    counts: Tensor
    rows: Tensor | None
    cu_selected: Tensor | None


@planned
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
    out: "Selection | tuple[Tensor | None, ...] | None" = None,
    backend: str = "auto",
) -> Selection:
    """The selected tokens of each row or sequence, in ascending position order: lines 5 and 6 of Algorithm 1.

    Give either ``k``, for so many tokens of smallest score (the paper's selection), or ``threshold``, for all tokens
    that score less; that choice looks at one token alone, so it is causal. Both are exact.

    With ``k``, a function of the row alone, tokens are taken in this order until k are found:

    1. the last ``keep_last`` valid tokens, the last one first;
    2. ascending score, -inf first and +inf last; -0.0 ties with 0.0, and at a tie the lower position goes first;
    3. NaN scores, the lower position first;
    4. the sink, whatever its score and also when ``keep_last`` covers it: it is taken only if everything is.

    With ``threshold``: the last ``keep_last`` valid tokens, and all with ``score < threshold``, which NaN never is; the
    sink never.

    With ``largest``, the k of largest score, as an indexer of sparse attention wants them: descending score in step 2,
    NaN still behind all numbers, and no sink unless ``sink_positions`` names one.

    Two layouts. Batch: ``scores [batch, tokens]``, with padding left out by ``starts`` and ``lengths``. Packed:
    ``scores [total]``, where sequence s owns the tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``; the selected tokens
    of all sequences then follow each other without gaps. The values of ``cu_seqlens`` and ``counts`` stay on the
    device, so the outputs have a size known beforehand, ``max_selected``, and -1 where nothing was selected.

    Args:
        scores: float32 ``[batch, tokens]`` or ``[total]``, the last stride 1, at most 2^30 tokens.
        k: an int, at most the number of tokens (with ``largest`` also more), or an int32 or int64 tensor ``[batch]`` or
            ``[seqs]``, clamped on the device to the number of valid tokens. See `keep_count`.
        threshold: a number, or a float32 tensor ``[batch]`` or ``[seqs]``.
        starts: int32 ``[batch]``, each row's first valid token. None: 0. Batch layout.
        lengths: int32 ``[batch]``, number of valid tokens from there. None: the rest of the row. A range that leaves
            the row is cut to it. Batch layout.
        sink_positions: int32 ``[batch]``, where each row's sink is, or ``[seqs]``, counted from the beginning of the
            sequence; -1 = not among these tokens. None: the first valid token, in the packed layout only where
            ``position_offsets`` is 0.
        cu_seqlens: int32 ``[seqs + 1]``, from 0, never falling, to the number of tokens; tokens past the last entry
            belong to no sequence. Selects the packed layout.
        position_offsets: int32 ``[seqs]``, how many tokens of each sequence precede these (are cached). None: 0.
            Packed layout.
        keep_last: 0 to 2^23.
        max_selected: size of ``positions``; what does not fit is not selected. In the batch layout it is the room of
            each row, and in the packed layout the room of all sequences, of which the first ones are served first. A
            smaller room takes fewer of smallest score, or with ``threshold`` the lowest positions. None: the size in
            ``out``, or else k if that is an int and the layout is batch, or else the number of tokens.
        largest: whether the largest scores are selected. With ``k``, batch layout.
        relative: whether positions count from each row's start, not from column 0. With ``k``, batch layout.
        out: `Selection` or a tuple like it, of int32 tensors to write to, contiguous, None for the fields that the
            layout has not. They may not overlap the inputs.
        backend: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    Returns:
        `Selection`, all int32. Batch: ``positions [batch, max_selected]``, ascending in each row and -1 past its count,
        and ``counts [batch]``. Packed: ``rows [max_selected]``, the indices of the selected tokens among all tokens,
        ``positions [max_selected]``, the same counted from the beginning of each sequence (``rows - cu_seqlens[s] +
        position_offsets[s]``), both -1 from ``cu_selected[-1]`` on; ``cu_selected [seqs + 1]``, where each sequence
        begins in them, and ``counts [seqs]``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, stride, device or range, or for
            arguments that exclude each other.
        orthorank_kernels.dispatch.BackendError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import select_tokens
        >>> scores = torch.tensor([[0.0, 5.0, 2.0, 7.0, 2.0]])
        >>> select_tokens(scores, 2).positions
        tensor([[2, 4]], dtype=torch.int32)
        >>> select_tokens(scores, threshold=6.0, max_selected=4)[:2]
        (tensor([[ 1,  2,  4, -1]], dtype=torch.int32), tensor([3], dtype=torch.int32))

        What an indexer selects from rows that begin elsewhere, with room for 3:

        >>> starts, lengths = torch.tensor([1]).int(), torch.tensor([2]).int()
        >>> select_tokens(scores, 3, starts=starts, lengths=lengths, largest=True, relative=True).positions
        tensor([[ 0,  1, -1]], dtype=torch.int32)

        Two packed sequences of 3 and 2 tokens, the second of which continues a prompt of which 10 tokens are cached:

        >>> cu_seqlens, cached = torch.tensor([0, 3, 5]).int(), torch.tensor([0, 10]).int()
        >>> picked = select_tokens(scores[0], 1, cu_seqlens=cu_seqlens, position_offsets=cached, max_selected=3)
        >>> picked.positions, picked.rows
        (tensor([ 2, 11, -1], dtype=torch.int32), tensor([ 2,  4, -1], dtype=torch.int32))
        >>> picked.cu_selected
        tensor([0, 1, 2], dtype=torch.int32)
    """
    layout, hints = ("[batch, tokens]", {1: _checks.PACKED_NEEDS}) if cu_seqlens is None else ("[total]", {})
    _checks.tensor("scores", scores, layout, (torch.float32,), hints=hints)
    _checks.unit_last_stride(scores=scores)
    _check_indexer(largest, relative, k, cu_seqlens)
    request = select_request(
        scores,
        k,
        threshold,
        starts,
        lengths,
        sink_positions,
        cu_seqlens,
        position_offsets,
        keep_last,
        max_selected,
        out,
        beyond=largest,
    )
    result = dispatch.run(
        _SELECT, (scores, *request, largest, relative), backend=backend, device=scores.device, out=out
    )
    return select_result(cu_seqlens, *result)


def _check_indexer(largest: bool, relative: bool, k: int | Tensor | None, cu_seqlens: Tensor | None) -> None:
    """``largest`` and ``relative`` are for rows with k."""
    for name, value in (("largest", largest), ("relative", relative)):
        _checks.flag(name, value)
        if value and k is None:
            raise ValueError(f"{name} is True and threshold was given; it is for k")
        if value and cu_seqlens is not None:
            raise ValueError(
                f"{name} is True and cu_seqlens was given; it is for rows of a batch: pass starts, lengths"
            )


def select_result(
    cu_seqlens: Tensor | None, positions: Tensor, counts: Tensor, rows: Tensor | None, cu_selected: Tensor | None
) -> Selection:
    """What an op with a selection returns, from what its operator returned."""
    if cu_seqlens is None:
        return Selection(positions, counts, None, None)
    return Selection(positions, counts, rows, cu_selected)


def select_request(
    tokens_like: Tensor,
    k: int | Tensor | None,
    threshold: float | Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    cu_seqlens: Tensor | None,
    position_offsets: Tensor | None,
    keep_last: int,
    max_selected: int | None,
    out: Any,
    beyond: bool = False,
) -> tuple[Any, ...]:
    """Check what is asked of ``tokens_like``, ``[batch, tokens, ...]`` or ``[total, ...]``, and where it is written.

    Args:
        beyond: whether k may be more than there are tokens.

    Returns:
        The operator's arguments after ``scores``.
    """
    if cu_seqlens is not None:
        rows, tokens = check_sequences(cu_seqlens, tokens_like, starts=starts, lengths=lengths), tokens_like.shape[0]
    else:
        rows, tokens = tokens_like.shape[:2]
        if position_offsets is not None:
            raise ValueError("position_offsets was given without cu_seqlens; positions of a batch count from column 0")
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens are too many: positions are int32, so there may be {MAX_TOKENS}")
    indices = {"starts": starts, "lengths": lengths, "sink_positions": sink_positions}
    for name, value in {**indices, "position_offsets": position_offsets}.items():
        if value is not None:
            _checks.row_index(name, value, rows, tokens_like, packed=cu_seqlens is not None)
    if position_offsets is not None and cu_seqlens is not None:
        _check_offsets(position_offsets, cu_seqlens)
    check_keep_last(keep_last)
    _checks.integer(
        "max_selected", max_selected, at_least=0, at_most=MAX_TOKENS, none="the largest number that can be selected"
    )
    each = "[batch]" if cu_seqlens is None else "[seqs]"
    which = _which(k, threshold, rows, MAX_TOKENS if beyond else tokens, tokens_like, each)
    width = tokens if cu_seqlens is not None or not isinstance(k, (int, torch.SymInt)) else k
    if max_selected is not None:
        width = max_selected
    elif out is not None:
        width = _room(out)
    if out is not None:
        _check_out(out, width, rows, cu_seqlens is not None, tokens_like)
    return *which, width, *indices.values(), cu_seqlens, position_offsets, keep_last


def check_sequences(cu_seqlens: Tensor, like: Tensor, **of_a_batch: Tensor | None) -> int:
    """Check ``cu_seqlens`` against the token axis of ``like``; how many sequences it has."""
    for name, value in of_a_batch.items():
        if value is not None:
            raise ValueError(f"{name} was given with cu_seqlens, which says where each sequence begins and ends")
    _checks.tensor("cu_seqlens", cu_seqlens, "[seqs + 1]", (torch.int32,))
    if cu_seqlens.shape[0] == 0:
        raise ValueError("cu_seqlens has shape [0]; it must be [seqs + 1], from 0 to the number of tokens")
    _checks.unit_last_stride(cu_seqlens=cu_seqlens)
    if cu_seqlens.device != like.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}; it must be on {like.device} like the other tensors")
    _checks.boundaries("cu_seqlens", cu_seqlens, like.shape[0], "the token axis")
    return cu_seqlens.shape[0] - 1


def _check_offsets(offsets: Tensor, cu_seqlens: Tensor) -> None:
    """Positions from ``offsets`` on are int32. Seen on a CPU, where looking is free."""
    if not _checks.readable(offsets, cu_seqlens):
        return
    for s, (offset, tokens) in enumerate(zip(offsets.tolist(), cu_seqlens.diff().tolist(), strict=True)):
        if offset < 0 or offset + tokens > MOST_POSITIONS:
            raise ValueError(
                f"position_offsets[{s}] is {offset}, and sequence {s} has {tokens} tokens; an offset counts the tokens "
                f"before them, from 0, and positions are int32: both together may be {MOST_POSITIONS}"
            )


def _which(
    k: int | Tensor | None, threshold: float | Tensor | None, rows: int, tokens: int, like: Tensor, each: str
) -> tuple[int | None, Tensor | None, float | None, Tensor | None]:
    """The operator's arguments k, seq_k, threshold and seq_threshold; without k the threshold decides."""
    if (k is None) == (threshold is None):
        given = "neither k nor threshold was" if k is None else "k and threshold were both"
        raise ValueError(f"{given} given; pass one of them")
    if isinstance(threshold, Tensor):
        _per_row("threshold", threshold, (torch.float32,), rows, like, each)
        return None, None, None, threshold
    if threshold is not None:
        _checks.number("threshold", threshold)
        inside = -ROUNDS_TO_INFINITY < threshold < ROUNDS_TO_INFINITY
        return None, None, float(threshold) if inside else (math.inf if threshold > 0 else -math.inf), None
    if isinstance(k, Tensor):
        _per_row("k", k, (torch.int32, torch.int64), rows, like, each)
        return tokens, k, None, None
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        cure = f": a share of n tokens is keep_count(n, {k!r})" if isinstance(k, float) else ""
        cure = ": pass int(k)" if hasattr(k, "__index__") and not isinstance(k, bool) else cure
        raise TypeError(f"k is {_checks.type_of(k)}; it must be an int or an int32 or int64 tensor {each}{cure}")
    if isinstance(k, int) and not 0 <= k <= tokens:  # of a length that is left open, no bound can be shown
        cure = f": pass min(k, {tokens})" if k > tokens else ""
        raise ValueError(f"k is {k}; it must be from 0 to the number of tokens, {tokens}{cure}")
    return k, None, None, None


def _per_row(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], rows: int, like: Tensor, each: str) -> None:
    _checks.tensor(name, value, each, dtypes)
    _checks.shape(name, value, [rows], "the batch" if each == "[batch]" else "the number of sequences")
    _checks.unit_last_stride(**{name: value})
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device} like the other tensors")


def _room(out: Any) -> int:
    """What ``out`` has room for, if it is what it must be."""
    first = out[0] if isinstance(out, (tuple, list)) and out else None
    return first.shape[-1] if isinstance(first, Tensor) and first.dim() else 0


def _check_out(out: Any, width: int, rows: int, packed: bool, like: Tensor) -> None:
    names = Selection._fields
    if not isinstance(out, (tuple, list)) or len(out) != len(names):
        raise TypeError(f"out is {_checks.kind_of(out)}; it must be a tuple ({', '.join(names)})")
    shapes = ([width], [rows], [width], [rows + 1]) if packed else ([rows, width], [rows], None, None)
    for name, tensor, shape in zip(names, out, shapes, strict=True):
        if shape is not None:
            _checks.output(f"out.{name}", tensor, shape, torch.int32, like)
        elif tensor is not None:
            raise ValueError(f"out.{name} was given without cu_seqlens; the batch layout has no {name}: pass None")


OUTPUTS = ("positions", "counts", "rows?", "cu_selected?")

_SELECT: Any = _library.define(
    pytorch.select_tokens,
    reference=reference.select_tokens,
    triton="selection.select_tokens",
    fake=lambda call: selection_outputs(call.scores, call.width, call.cu_seqlens),
    outputs=OUTPUTS,
)
