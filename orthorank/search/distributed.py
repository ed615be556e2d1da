"""Several processes on one search: what ``accelerate launch`` or ``torchrun`` started, as one group.

The launcher says who is who in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Every process
loads the whole model and runs its share of the windows; figures are exchanged as float64, so that they are added up in
the order, and with the bits, of a single process. Rank 0 writes and prints.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from orthorank.common.errors import OrthoRankError
from orthorank.stack.processes import OneProcess, Processes

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # for the slowest of the processes to load its model


class Group(Processes, Protocol):
    """What the search as a whole needs beside what the evaluator does."""

    def share(self, value: T) -> T:
        """Rank 0's value, on every process."""

    def collect(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, on every process."""

    def add(self, tensor: "Tensor") -> None:
        """Make ``tensor`` the sum of those of all processes, in place."""


class Alone(OneProcess):
    """A group of one.

    >>> Alone().collect("a")
    ['a']
    """

    def share(self, value: T) -> T:
        """``value``."""
        return value

    def collect(self, value: T) -> list[T]:
        """A list of ``value``."""
        return [value]

    def add(self, tensor: "Tensor") -> None:
        """Nothing to add."""


class Launched:
    """The processes of `torch.distributed`'s default group, which must be there."""

    def __init__(self) -> None:
        from torch import distributed

        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def gather(self, values: list[float]) -> list[list[float]]:
        """The lists of all processes; a pickled float keeps its bits."""
        return self.collect(list(values))

    def share(self, value: T) -> T:
        """Rank 0's value."""
        from torch import distributed

        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def collect(self, value: T) -> list[T]:
        """The values of all processes."""
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def add(self, tensor: "Tensor") -> None:
        """All-reduce."""
        from torch import distributed

        distributed.all_reduce(tensor)


def launched_rank() -> int:
    """This process's rank as its launcher wrote it down, 0 without one."""
    try:
        return int(os.environ.get("RANK", "0")) if _launched_size() > 1 else 0
    except ValueError:
        return 0


def local_device(device: str) -> str:
    """``device``, with the number of this process's own GPU where ``"auto"`` or ``"cuda"`` leaves it open."""
    import torch

    if _launched_size() < 2 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= torch.cuda.device_count():
        raise OrthoRankError(
            f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs; start as many "
            "processes as GPUs, or give --device cpu"
        )
    return f"cuda:{own}"


@contextmanager
def joined() -> Iterator[Group]:
    """The group of the launched processes within the block, or this process alone.

    A default group that is there already is used, and left as it is.

    Raises:
        OrthoRankError: the launcher's environment is incomplete, or the other processes cannot be reached.
    """
    from torch import distributed

    there = distributed.is_available() and distributed.is_initialized()
    if not there and _launched_size() < 2:
        yield Alone()
        return
    if not there:
        _connect()
    try:
        yield Launched()
    finally:
        if not there:
            distributed.destroy_process_group()


def together(group: Group, work: Callable[[], T]) -> T:
    """Do ``work`` on every process; where it fails on one it fails on all, with the same sentence.

    Without this the others would wait for the failed one.
    """
    value: T | None = None
    problem: str | None = None
    try:
        value = work()
    except OrthoRankError as error:
        problem = str(error)
    if problems := [other for other in group.collect(problem) if other is not None]:
        raise OrthoRankError(problems[0])
    return value  # type: ignore[return-value] # work has returned, or there is a problem


def _connect() -> None:
    import torch
    from torch import distributed

    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OrthoRankError(
            f"this is one of {_launched_size()} processes by WORLD_SIZE, and the others cannot be reached: {reason}; "
            "start them with accelerate launch or torchrun, or unset WORLD_SIZE"
        ) from error


def _launched_size() -> int:
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1
