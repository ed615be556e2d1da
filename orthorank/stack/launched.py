"""The processes that ``accelerate launch`` or ``torchrun`` started, as one group.

The launcher says who is who in the environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT). Every process
loads the whole model and runs its share of the windows; figures are exchanged as float64, so that they are added up in
the order, and with the bits, of a single process. Rank 0 writes and prints.
"""

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from orthorank.common.errors import OrthoRankError

T = TypeVar("T")

PATIENCE = timedelta(hours=2)  # for the slowest of the processes to load its model


class Launched:
    """The processes of `torch.distributed`'s default group, which must be there."""

    def __init__(self) -> None:
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()

    def gather(self, values: list[float]) -> list[list[float]]:
        """The lists of all processes; a pickled float keeps its bits."""
        return self.collect(list(values))

    def share(self, value: T) -> T:
        """Rank 0's value."""
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def collect(self, value: T) -> list[T]:
        """The values of all processes."""
        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value)
        return values

    def add(self, tensor: Tensor) -> None:
        """All-reduce."""
        distributed.all_reduce(tensor)


def connect() -> None:
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
        distributed.init_process_group(backend, timeout=PATIENCE)
    except (ValueError, RuntimeError, OSError) as error:  # torch's DistError is a RuntimeError
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise OrthoRankError(
            f"this is one of {os.environ.get('WORLD_SIZE')} processes by WORLD_SIZE, and the others cannot be reached: "
            f"{reason}; start them with accelerate launch or torchrun, or unset WORLD_SIZE"
        ) from error
