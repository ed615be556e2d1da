"""What the caller says of the calls to come: which of their tokens are prompt, and which are generated."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthorank.errors import OrthoRankError


@dataclass
class Phase:
    """What the caller said of the calls to come; see `Handle.decoding`, `prefilling`, `context` and `generate()`.

    Args:
        prompt: columns that are prompt; None: every multi-token call is prefill.
        keep_last: tokens at the prompt's end that are always updated.
        padding_mask: the ``[batch, columns]`` mask that `generate()` was about to turn into another kind.
        unpadded: whether `generate()` had no mask, so that the one it makes shows no padding, only windows.
        decodes: whether the next call is known to hold generated tokens alone; what a compiled graph goes by.
        any_cache: whether a cache may be continued that another plan, or none, has filled.
        context: tokens of each row (or one number for all) that are prompt, counted from the row's first; the others
            are decoded. None: ``prompt`` says.
    """

    prompt: int | None = None
    keep_last: int = 0
    padding_mask: Tensor | None = None
    unpadded: bool = False
    decodes: bool = False
    any_cache: bool = False
    context: tuple[int, ...] | None = None


def context_lengths(lengths: int | Sequence[int] | Tensor) -> tuple[int, ...]:
    """``lengths`` of `orthorank.context`, one for each row or one for all.

    >>> context_lengths([3, 4])
    (3, 4)
    """
    given = lengths.tolist() if isinstance(lengths, Tensor) else lengths
    numbers = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not numbers or not all(type(number) is int and number > 0 for number in numbers):
        raise OrthoRankError(
            f"lengths is {given!r}; it must be the number of context tokens, 1 or more, or a list of one for each row"
        )
    return tuple(numbers)


@contextmanager
def phase_of(holder: Any, phase: Phase) -> Iterator[None]:
    """Inside, calls of the model are read by ``phase``."""
    refuse_other_threads(holder)
    before = holder.phase, holder.thread
    holder.phase, holder.thread = phase, threading.get_ident()
    try:
        yield
    finally:
        holder.phase, holder.thread = before


def refuse_other_threads(holder: Any) -> None:
    """A phase holds for the thread that began it; another thread's calls would be read by it, too."""
    if holder.thread is not None and holder.thread != threading.get_ident():
        raise OrthoRankError(
            "a model with a plan applied is in use by another thread (in generate(), decoding() or prefilling()); give "
            "each thread a copy.deepcopy of the patched model, or take turns with a lock"
        )
