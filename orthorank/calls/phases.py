"""What the caller says of the calls to come: which of their tokens are prompt, and which are generated."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from orthorank.common.errors import OrthoRankError


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
        given: columns that `generate()` hands to the next call; None: it has prepared none.
        prepared: whether `generate()` has prepared the next call; None: it has prepared no call yet.
        cache: that of the last call that it prepared, or None.
        added: columns that came before the prompt of `generate()` afterwards.
    """

    prompt: int | None = None
    keep_last: int = 0
    padding_mask: Tensor | None = None
    unpadded: bool = False
    decodes: bool = False
    any_cache: bool = False
    context: tuple[int, ...] | None = None
    given: int | None = None
    prepared: bool | None = None
    cache: Any = None
    added: int = 0

    @property
    def prompt_end(self) -> int | None:
        """Where the prompt ends, among all columns; None: not said."""
        return None if self.prompt is None else self.prompt + self.added


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
    with holder.lock:  # another thread's calls would be read by this phase, too
        before, holder.phase = holder.phase, phase
        try:
            yield
        finally:
            holder.phase = before
