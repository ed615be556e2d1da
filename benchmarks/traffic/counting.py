"""Counts what kernels ask memory for while Triton's interpreter runs them.

Every element that a load, a store or an atomic does not mask off counts, in every program, whether a pointer or a
tensor descriptor leads to it. *Requested* bytes count again each time; *unique* bytes are those that were touched at
all: what memory must move at best.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

ACCESSES = {"create_masked_load": "read", "create_masked_store": "written", "create_atomic_rmw": "both",
            "create_atomic_cas": "both"}  # fmt: skip


@dataclass
class _Region:
    """The storage of a tensor that was an argument, with a flag for each byte."""

    start: int
    read: np.ndarray
    written: np.ndarray

    @property
    def end(self) -> int:
        return self.start + len(self.read)


@dataclass
class Traffic:
    """Bytes, and launches of kernels; an atomic counts once in ``requested``, and as read and written in ``unique``."""

    requested: int = 0
    launches: int = 0
    programs: int = 0
    atomics: int = 0
    _regions: dict[int, _Region] = field(default_factory=dict, repr=False)

    @property
    def unique(self) -> int:
        return sum(int(r.read.sum()) + int(r.written.sum()) for r in self._regions.values())

    def add_tensors(self, value: Any) -> None:
        """Watch the tensors in an argument: themselves, in tuples, or under descriptors and views of other types."""
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in self._regions:
                flags = np.zeros((2, storage.nbytes()), dtype=bool)
                self._regions[storage.data_ptr()] = _Region(storage.data_ptr(), *flags)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.add_tensors(item)
        elif hasattr(value, "base"):
            self.add_tensors(value.base)

    def record(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        mask = np.broadcast_to(mask, addresses.shape)
        found = addresses[mask].astype(np.int64).ravel()
        self.requested += found.size * size
        while found.size:
            region = self._region_of(int(found[0]))
            inside = (found >= region.start) & (found < region.end)
            offsets = found[inside] - region.start
            for byte in range(size):
                if kind != "written":
                    region.read[offsets + byte] = True
                if kind != "read":
                    region.written[offsets + byte] = True
            found = found[~inside]

    def _region_of(self, address: int) -> _Region:
        for region in self._regions.values():
            if region.start <= address < region.end:
                return region
        raise LookupError(f"a kernel asks for address {address:#x}, which is in none of its arguments")


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Counts what kernels do inside the block, in a process that set ``TRITON_INTERPRET=1`` before it had Triton."""
    from triton.runtime import interpreter

    builder, traffic = interpreter.interpreter_builder, Traffic()
    launch = interpreter.GridExecutor.__call__

    def counting(name: str, kind: str, access: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            pointers = args[1 if name == "create_atomic_rmw" else 0]
            index = {"create_masked_load": 1, "create_masked_store": 2, "create_atomic_rmw": 3}.get(name)
            mask = np.True_ if index is None else args[index].data
            size = pointers.get_element_ty().primitive_bitwidth // 8
            traffic.atomics += kind == "both"
            traffic.record(kind, np.asarray(pointers.data), mask, size)
            return access(*args, **options)

        return call

    def counted_launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        traffic.launches += 1
        traffic.add_tensors([*args, *kwargs.values()])
        result = launch(self, *args, **kwargs)
        traffic.programs += int(np.prod(builder.grid_dim))
        return result

    with contextlib.ExitStack() as undo:
        for name, kind in ACCESSES.items():
            method = getattr(builder, name)
            setattr(builder, name, counting(name, kind, method))
            undo.callback(delattr, builder, name)  # the class's own method shows again
        interpreter.GridExecutor.__call__ = counted_launch
        undo.callback(setattr, interpreter.GridExecutor, "__call__", launch)
        yield traffic


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
