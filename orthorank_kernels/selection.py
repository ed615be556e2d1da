"""Which tokens a layer processes: the number of them, and the most orthogonal ones in position order."""

import math
from typing import Any, overload

import torch
from torch import Tensor

from orthorank_kernels import _checks, _library, dispatch
from orthorank_kernels.reference import selection as reference
from orthorank_kernels.scoring import check_norm

# Forced tokens rank below the key of -inf, which leaves them 2^23 places.
MAX_KEEP_LAST = 2**23
MAX_TOKENS = 2**30


@overload
def keep_count(n_valid: int, keep_ratio: float, keep_last: int = 0, *, sink_inside: bool = True) -> int: ...
@overload
def keep_count(
    n_valid: Tensor, keep_ratio: float, keep_last: int = 0, *, sink_inside: bool | Tensor = True
) -> Tensor: ...
def keep_count(
    n_valid: int | Tensor, keep_ratio: float, keep_last: int = 0, *, sink_inside: bool | Tensor = True
) -> int | Tensor:
    """How many of ``n_valid`` tokens are selected: ``floor(keep_ratio * n_valid + 1e-6)``, in float64.

    Every path takes k from here, so a row alone selects what it selects in a batch. The 1e-6 repairs products such
    as ``0.29 * 100``, which is just below 29 in float64. With ``keep_last`` > 0 and a ratio strictly between 0 and 1,
    at least ``keep_last`` tokens are selected, but never the sink: ``min(n_valid - 1, max(k, keep_last))``. In a later
    chunk of a prompt the sink is not among the tokens, and all of them may be: ``min(n_valid, max(k, keep_last))``.

    Args:
        n_valid: valid (unpadded) tokens of a row: an int, or an integer tensor with one number for each row.
        keep_ratio: from 0 to 1; Algorithm 1 of the paper calls it ``pruning_ratio``. 1 gives ``n_valid``.
        keep_last: how many of the last tokens must be among the selected.
        sink_inside: whether the sink is one of the tokens; for a tensor ``n_valid`` also a bool tensor of its shape.

    Returns:
        An int for an int; for a tensor an int32 tensor of its shape, on its device, without waiting for it.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of its range.

    Example:
        >>> import torch
        >>> from orthorank_kernels import keep_count
        >>> keep_count(2048, 1 / 3), keep_count(100, 0.29), keep_count(2, 0.1, keep_last=1)
        (682, 29, 1)
        >>> keep_count(1, 1 / 3, keep_last=1), keep_count(1, 1 / 3, keep_last=1, sink_inside=False)
        (0, 1)
        >>> keep_count(torch.tensor([100, 3, 0]), 1 / 3)
        tensor([33,  1,  0], dtype=torch.int32)
    """
    if not 0.0 <= keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is {keep_ratio}; it must be from 0 to 1")
    _check_keep_last(keep_last)
    at_least = keep_last if 0.0 < keep_ratio < 1.0 else 0
    if isinstance(n_valid, Tensor):
        if n_valid.dtype.is_floating_point or n_valid.dtype.is_complex or n_valid.dtype == torch.bool:
            raise TypeError(f"n_valid has dtype {n_valid.dtype}; it must be an integer dtype such as torch.int32")
        counts = (n_valid.double() * keep_ratio + 1e-6).floor().to(torch.int32)
        if at_least:
            inside = sink_inside.to(torch.int32) if isinstance(sink_inside, Tensor) else int(sink_inside)
            counts = torch.minimum(n_valid.to(torch.int32) - inside, counts.clamp(min=at_least))
        return counts.clamp(min=0)
    if not isinstance(n_valid, int):
        raise TypeError(f"n_valid is a {type(n_valid).__name__}; it must be an int or an integer tensor")
    if isinstance(sink_inside, Tensor):
        raise TypeError("sink_inside is a tensor and n_valid an int; both must be tensors, or sink_inside a bool")
    count = math.floor(keep_ratio * n_valid + 1e-6)
    return max(0, min(n_valid - sink_inside, max(count, at_least)) if at_least else count)


def select_tokens(
    scores: Tensor,
    k: int | Tensor,
    *,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    keep_last: int = 0,
    max_selected: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k tokens with the smallest scores in each row, in ascending position order: lines 5 and 6 of Algorithm 1.

    The choice is exact and a function of the row alone. Tokens are taken in this order until k are found:

    1. the last ``keep_last`` valid tokens, the last one first;
    2. ascending score, -inf first and +inf last; -0.0 ties with 0.0, and at a tie the lower position goes first;
    3. NaN scores, the lower position first;
    4. the sink, whatever its score and also when ``keep_last`` covers it: it is taken only if everything is.

    Args:
        scores: float32 ``[batch, tokens]``, the last stride 1, at most 2^30 tokens.
        k: an int, at most ``tokens``, or an int32 or int64 tensor ``[batch]``, clamped on the device to the number
            of valid tokens of each row. See `keep_count`.
        starts: int32 ``[batch]``, each row's first valid token. None: 0.
        lengths: int32 ``[batch]``, number of valid tokens from there. None: the rest of the row. A range that leaves
            the row is cut to it.
        sink_positions: int32 ``[batch]``, where each row's sink is, -1 = not among these tokens. None: the first
            valid token.
        keep_last: 0 to 2^23.
        max_selected: width of ``positions``. A larger k is clamped to it. None: k if that is an int, else ``tokens``.
        backend: ``"auto"``, ``"triton"`` or ``"reference"``.

    Returns:
        ``positions``, int32 ``[batch, max_selected]``, ascending, -1 past each row's count, and ``counts``, int32
        ``[batch]``: ``min(k, valid tokens, max_selected)``. Padding is never selected.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, stride, device or range.
        orthorank_kernels.dispatch.BackendError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import select_tokens
        >>> scores = torch.tensor([[0.0, 5.0, 2.0, 7.0, 2.0]])
        >>> select_tokens(scores, 2)
        (tensor([[2, 4]], dtype=torch.int32), tensor([2], dtype=torch.int32))
        >>> select_tokens(scores, torch.tensor([3]), lengths=torch.tensor([3], dtype=torch.int32))[0]
        tensor([[ 0,  1,  2, -1, -1]], dtype=torch.int32)
    """
    _checks.tensor("scores", scores, "[batch, tokens]", (torch.float32,))
    _checks.unit_last_stride(scores=scores)
    request = _check_request(scores, k, starts, lengths, sink_positions, keep_last, max_selected)
    return dispatch.run(
        _SELECT,
        (scores, *request, starts, lengths, sink_positions, keep_last),
        backend=backend,
        device=scores.device,
    )


def rms_norm_select(
    hidden_states: Tensor,
    weight: Tensor,
    eps: float,
    k: int | Tensor,
    *,
    sink: Tensor | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sink_positions: Tensor | None = None,
    keep_last: int = 0,
    max_selected: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`rms_norm_score` and `select_tokens` on its scores, in one kernel launch.

    The results are those of the two calls, bit for bit; the arguments are theirs too.

    Returns:
        ``normed`` ``[batch, tokens, hidden]``, ``scores`` float32 ``[batch, tokens]``, ``positions`` int32
        ``[batch, max_selected]`` and ``counts`` int32 ``[batch]``.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape, stride, device or range.
        orthorank_kernels.dispatch.BackendError: ``backend="triton"`` cannot run here.

    Example:
        >>> import torch
        >>> from orthorank_kernels import rms_norm_select
        >>> x = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [1.0, -0.5]]])
        >>> normed, scores, positions, counts = rms_norm_select(x, torch.ones(2), 1e-6, k=2)
        >>> positions
        tensor([[1, 2]], dtype=torch.int32)
    """
    check_norm(hidden_states, weight, None, "rms", None, 0.0, "inner", sink, starts, lengths, None)
    request = _check_request(hidden_states, k, starts, lengths, sink_positions, keep_last, max_selected)
    return dispatch.run(
        _NORM_SELECT,
        (hidden_states, weight, eps, *request, sink, starts, lengths, sink_positions, keep_last),
        backend=backend,
        device=hidden_states.device,
    )


def _check_keep_last(keep_last: int) -> None:
    if not 0 <= keep_last <= MAX_KEEP_LAST:
        raise ValueError(f"keep_last is {keep_last}; it must be from 0 to {MAX_KEEP_LAST}")


def _check_request(
    rows: Tensor,
    k: int | Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    keep_last: int,
    max_selected: int | None,
) -> tuple[int, Tensor | None, int]:
    """Check what is asked of ``rows [batch, tokens, ...]``; returns the bound on k, k of each row, and the width."""
    batch, tokens = rows.shape[:2]
    if tokens > MAX_TOKENS:
        raise ValueError(f"{tokens} tokens are too many: positions are int32, so a row may have {MAX_TOKENS}")
    for name, value in (("starts", starts), ("lengths", lengths), ("sink_positions", sink_positions)):
        if value is not None:
            _checks.row_index(name, value, batch, rows)
    _check_keep_last(keep_last)
    if max_selected is not None and max_selected < 0:
        raise ValueError(f"max_selected is {max_selected}; it must be at least 0, or None")
    if isinstance(k, Tensor):
        _checks.tensor("k", k, "[batch]", (torch.int32, torch.int64))
        _checks.shape("k", k, [batch], "the batch")
        _checks.unit_last_stride(k=k)
        if k.device != rows.device:
            raise ValueError(f"k is on {k.device}; it must be on {rows.device} like the other tensors")
        width = tokens if max_selected is None else max_selected
        return width, k, width
    if not isinstance(k, int):
        raise TypeError(f"k is a {type(k).__name__}; it must be an int or an int32 or int64 tensor [batch]")
    if not 0 <= k <= tokens:
        raise ValueError(f"k is {k}; it must be from 0 to the number of tokens, {tokens}")
    return k, None, k if max_selected is None else max_selected


def _fake_select(
    scores: Tensor,
    k: int,
    row_k: Tensor | None,
    width: int,
    starts: Tensor | None,
    lengths: Tensor | None,
    sink_positions: Tensor | None,
    keep_last: int,
) -> tuple[Tensor, Tensor]:
    batch = scores.shape[0]
    return scores.new_empty(batch, width, dtype=torch.int32), scores.new_empty(batch, dtype=torch.int32)


def _fake_norm_select(
    hidden_states: Tensor, weight: Tensor, eps: float, k: int, row_k: Tensor | None, width: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, tokens, _ = hidden_states.shape
    normed = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
    scores = hidden_states.new_empty(batch, tokens, dtype=torch.float32)
    positions = hidden_states.new_empty(batch, width, dtype=torch.int32)
    return normed, scores, positions, hidden_states.new_empty(batch, dtype=torch.int32)


_REQUEST = "SymInt k, Tensor? row_k, SymInt width"
_ROWS = "Tensor? starts, Tensor? lengths, Tensor? sink_positions, SymInt keep_last"

_SELECT: Any = _library.define(
    f"select_tokens(Tensor scores, {_REQUEST}, {_ROWS}) -> (Tensor, Tensor)",
    cpu=reference.select_tokens,
    triton="selection.select_tokens",
    fake=_fake_select,
)
_NORM_SELECT: Any = _library.define(
    f"rms_norm_select(Tensor hidden_states, Tensor weight, float eps, {_REQUEST}, Tensor? sink, {_ROWS})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=reference.rms_norm_select,
    triton="selection.rms_norm_select",
    fake=_fake_norm_select,
)
