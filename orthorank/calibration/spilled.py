"""Where the states of the windows are kept while something is fitted: in memory, or in files mapped into it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import writable_folder

Keep = Callable[[str, int, Tensor], Tensor]


@contextmanager
def spilled(folder: Path | None) -> Iterator[Keep]:
    """A function ``keep(name, number, state)`` that returns the state as it is kept: the same numbers, writable.

    What is kept under the same name and number takes the place of what was there.

    Args:
        folder: for a folder with one file a state, which is deleted at the end; None: states stay in memory.

    Raises:
        OrthoRankError: files cannot be written there, or the disk is full.

    Example:
        >>> with spilled(None) as keep:
        ...     keep("state", 0, torch.ones(2)).tolist()
        [1.0, 1.0]
    """
    if folder is None:
        yield lambda name, number, state: state
        return
    with tempfile.TemporaryDirectory(prefix="orthorank-states-", dir=writable_folder(folder, "spill")) as inside:
        yield lambda name, number, state: _mapped(Path(inside) / f"{name}-{number}", state)


def _mapped(file: Path, state: Tensor) -> Tensor:
    size = state.numel() * state.element_size()
    if not file.exists():
        try:
            with file.open("wb") as opened:
                if hasattr(
                    os, "posix_fallocate"
                ):  # else a full disk would be noticed by a signal that ends the process
                    os.posix_fallocate(opened.fileno(), 0, size)
                else:
                    opened.truncate(size)
        except OSError as error:
            raise OrthoRankError(
                f"spill: {size / 2**20:,.1f} MiB of states cannot be written to {file.parent.parent}: {error.strerror}"
            ) from error
    room = torch.from_file(str(file), shared=True, size=state.numel(), dtype=state.dtype)
    return room.view(state.shape).copy_(state)
