"""How many tokens a layer processes."""

import math
from typing import overload

import torch
from torch import Tensor

from orthorank_kernels import checks as _checks

# Forced tokens rank below the key of -inf, which leaves them 2^23 places.
MAX_KEEP_LAST = 2**23
MAX_COUNT = 2**30  # as many tokens as a selection takes


@overload
def keep_count(
    n_valid: int, keep_ratio: float, keep_last: int = 0, *, sink_inside: bool = True, multiple: int = 1
) -> int: ...
@overload
def keep_count(
    n_valid: Tensor, keep_ratio: float, keep_last: int = 0, *, sink_inside: bool | Tensor = True, multiple: int = 1
) -> Tensor: ...
def keep_count(
    n_valid: int | Tensor,
    keep_ratio: float,
    keep_last: int = 0,
    *,
    sink_inside: bool | Tensor = True,
    multiple: int = 1,
) -> int | Tensor:
    """How many of ``n_valid`` tokens are selected: ``floor(keep_ratio * n_valid + 1e-6)``, in float64.

    Every path takes k from here, so a row alone selects what it selects in a batch. The 1e-6 repairs products such
    as ``0.29 * 100``, which is just below 29 in float64. With ``keep_last`` > 0 and a ratio strictly between 0 and 1,
    at least ``keep_last`` tokens are selected, but never the sink: ``min(n_valid - 1, max(k, keep_last))``. In a later
    chunk of a prompt the sink is not among the tokens, and all of them may be: ``min(n_valid, max(k, keep_last))``.

    Args:
        n_valid: valid (unpadded) tokens of a row: an int, or an integer tensor ``[rows]``.
        keep_ratio: from 0 to 1; Algorithm 1 of the paper calls it ``pruning_ratio``. 1 gives ``n_valid``.
        keep_last: how many of the last tokens must be among the selected.
        sink_inside: whether the sink is one of the tokens; for a tensor ``n_valid`` also a bool tensor of its shape.
        multiple: for a ratio strictly between 0 and 1, round k up to a multiple of this, as far as there are tokens:
            matrix products on a GPU take as long for 682 rows as for 768. The sink stays out here, too.

    Returns:
        An int for an int; for a tensor an int32 tensor of its shape, on its device, without waiting for it.

    Raises:
        TypeError, ValueError: for an argument of the wrong type or out of its range.

    Example:
        >>> import torch
        >>> from orthorank_kernels import keep_count
        >>> keep_count(2048, 1 / 3), keep_count(100, 0.29), keep_count(2, 0.1, keep_last=1)
        (682, 29, 1)
        >>> keep_count(2048, 1 / 3, multiple=128), keep_count(100, 0.9, multiple=128)
        (768, 99)
        >>> keep_count(1, 1 / 3, keep_last=1), keep_count(1, 1 / 3, keep_last=1, sink_inside=False)
        (0, 1)
        >>> keep_count(torch.tensor([100, 3, 0]), 1 / 3)
        tensor([33,  1,  0], dtype=torch.int32)
    """
    if isinstance(keep_ratio, bool) or not isinstance(keep_ratio, (int, float)):
        raise TypeError(f"keep_ratio is {keep_ratio!r}; it must be a number from 0 to 1")
    if not 0.0 <= keep_ratio <= 1.0:
        raise ValueError(f"keep_ratio is {keep_ratio}; it must be from 0 to 1")
    check_keep_last(keep_last)
    if multiple != 1 or multiple.__class__ is not int:
        _checks.integer("multiple", multiple, at_least=1, at_most=MAX_COUNT)
    selects = 0.0 < keep_ratio < 1.0
    at_least = keep_last if selects else 0
    bounded = selects and (keep_last > 0 or multiple > 1)  # else k is below the number of tokens as it is
    if isinstance(n_valid, Tensor):
        if n_valid.dtype.is_floating_point or n_valid.dtype.is_complex or n_valid.dtype == torch.bool:
            raise TypeError(f"n_valid has dtype {n_valid.dtype}; it must be an integer dtype such as torch.int32")
        valid = n_valid.double().clamp(max=MAX_COUNT)  # a bound that narrow integers cannot hold
        counts = (valid * keep_ratio + 1e-6).floor().to(torch.int32)
        if isinstance(sink_inside, Tensor) and (sink_inside.dtype, sink_inside.shape) != (torch.bool, n_valid.shape):
            raise ValueError(
                f"sink_inside is a tensor {list(sink_inside.shape)} of {sink_inside.dtype}; it must be a bool, or a "
                f"bool tensor of the shape of n_valid, {list(n_valid.shape)}"
            )
        if multiple > 1 and selects:
            counts = (counts + (multiple - 1)) // multiple * multiple
        if bounded:
            inside = sink_inside.to(torch.int32) if isinstance(sink_inside, Tensor) else int(sink_inside)
            counts = torch.minimum(valid.to(torch.int32) - inside, counts.clamp(min=at_least))
        return counts.clamp(min=0)
    if not isinstance(n_valid, (int, torch.SymInt)):  # a length that an exported program leaves open
        raise TypeError(f"n_valid is {_checks.type_of(n_valid)}; it must be an int or an integer tensor")
    _checks.integer("n_valid", n_valid, at_least=0, at_most=MAX_COUNT)
    if isinstance(sink_inside, Tensor):
        raise TypeError("sink_inside is a tensor and n_valid an int; both must be tensors, or sink_inside a bool")
    count = math.trunc(keep_ratio * n_valid + 1e-6)  # the floor, which an exported program cannot be saved with
    if not bounded:
        return max(0, count)
    count = (count + multiple - 1) // multiple * multiple
    return max(0, min(n_valid - int(sink_inside), max(count, at_least)))


def check_keep_last(keep_last: int) -> None:
    """``keep_last`` is a number of tokens that the selection can force."""
    _checks.integer("keep_last", keep_last, at_least=0, at_most=MAX_KEEP_LAST)
