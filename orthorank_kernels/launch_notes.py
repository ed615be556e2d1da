"""What is noted of one call's launches, and the plan of launches that it makes. `launch_plan` says what plans are for.

A pointer that a kernel got is found again by what it points at: the beginning of one of the call's tensors, a place
inside one of them (a half of a merged projection), the beginning of a result, or memory that a launcher said it needs
beside. Where any of it is not clear no plan is made, so that the worst of a new launcher is that it has none.
"""

import functools
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthorank_kernels.launch_numbers import Bound
from orthorank_kernels.launch_trace import ALIGNED, Layout, Trace

PLAIN = frozenset({int, float, bool, str, type(None)})
TENSORS = (Tensor, torch.nn.Parameter)


class Noted(NamedTuple):
    """One launch, with what Triton returned: the compiled kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    compiled: Any


@dataclass
class Notes:
    """What happens in one call, and the trace of its numbers, if it is to make a plan for others."""

    trace: Trace | None = None
    launches: list[Noted] = field(default_factory=list)
    scratch: list[tuple[Tensor, bool]] = field(default_factory=list)  # each with whether it begins with zeros


class Thread(threading.local):
    notes: Notes | None = None  # taken at the moment
    plain = False  # whether a call is under way that a plan may be made of: only its launches matter, no operator


THREAD = Thread()


def launch(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """``kernel[grid](**arguments)``, noted."""
    trace = None if THREAD.notes is None else THREAD.notes.trace
    compiled = kernel[grid](**arguments) if trace is None else trace.launch(kernel, grid, arguments)
    note(kernel, grid, arguments, compiled)


def note(kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any], compiled: Any) -> None:
    """A kernel was launched."""
    if THREAD.notes is not None:
        THREAD.notes.launches.append(Noted(kernel, grid, arguments, compiled))


def note_scratch(memory: Tensor, zeros: bool) -> None:
    """A launch needs ``memory`` beside its results, which begins with zeros or with anything."""
    if THREAD.notes is not None:
        THREAD.notes.scratch.append((memory, zeros))


class Launch(NamedTuple):
    """A launch of a plan: the compiled kernel's arguments, and what in them belongs to the call."""

    run: Any
    values: list[Any]
    pointers: list[tuple[int, int, int]]  # place in values, tensor, bytes from its beginning
    descriptors: list[tuple[int, int, Any, dict[str, Any]]]  # place, tensor, class, and what else a descriptor says


@dataclass(frozen=True)
class Plan:
    """What a call does when one like it was there before. Tensors are numbered: the call's, then those made.

    Args:
        made: shape, strides and dtype of each, and whether it begins with zeros.
        apart: pairs of a written tensor and another, with the bytes from the first to the last of each, which must not
            meet; or they do and are apart nevertheless, as rows that take turns in memory, at this distance alone.
        written: tensors of the call whose version PyTorch counts.
        result: builds it from all tensors.
    """

    device: torch.device
    made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype, bool]]
    launches: list[Launch]
    apart: list[tuple[int, int, int, int, int | None]]
    written: list[int]
    result: Callable[[list[Tensor]], Any]

    def fits(self, pointers: list[int]) -> bool:
        """Whether what is written to lies apart from the rest."""
        for a, b, n, m, woven in self.apart:
            distance = pointers[a] - pointers[b]
            if -n < distance < m and distance != woven:
                return False
        return True

    def run(self, tensors: list[Tensor], pointers: list[int]) -> Any:
        """The call's result. Both lists are the plan's to add to."""
        for shape, strides, dtype, zeros in self.made:
            new = torch.empty_strided(shape, strides, dtype=dtype, device=self.device)
            tensors.append(new.zero_() if zeros else new)
            pointers.append(new.data_ptr())
        index = self.device.index
        if index is None or index == torch.cuda.current_device():
            self._launch(tensors, pointers)
        else:
            with torch.cuda.device(index):
                self._launch(tensors, pointers)
        for i in self.written:
            torch.autograd.graph.increment_version(tensors[i])
        return self.result(tensors)

    def _launch(self, tensors: list[Tensor], pointers: list[int]) -> None:
        for run, kept, places, descriptors in self.launches:
            values = kept.copy()
            for place, i, offset in places:
                values[place] = pointers[i] + offset
            for place, i, kind, parts in descriptors:
                values[place] = descriptor = kind.__new__(kind)  # without its checks, which one like it has passed
                vars(descriptor).update(parts, base=tensors[i])
            run(*values)


def plan_of(notes: Notes, result: Any, tensors: list[Tensor], pointers: list[int], written: list[int]) -> Plan | None:
    """The plan of a call that gave ``result``, or None where its launches do not say all. After a trace it has numbers.

    Args:
        tensors, pointers: of the call; written: which of them it writes to.
    """
    layout: Callable[[Tensor], Layout] = _layout if notes.trace is None else notes.trace.layout
    leaves = result if isinstance(result, tuple) else (result,)
    if any(x is not None and x.__class__ not in TENSORS for x in leaves):
        return None
    given = {id(x) for x in tensors}
    new = list({id(x): x for x in leaves if x is not None and id(x) not in given}.values())
    every = [*tensors, *new, *(x for x, _ in notes.scratch)]
    where = [*pointers, *(x.data_ptr() for x in every[len(pointers) :])]
    spans = [span(*_layout(x), x.element_size()) for x in every]
    traced = notes.trace is not None
    launches = [_launch(launched, every, where, spans, len(pointers), traced=traced) for launched in notes.launches]
    sizes = [span(*layout(x), x.element_size()) for x in every] if traced else spans
    apart = _apart(where, spans, sizes, len(pointers), written)
    reached = {i for launched in launches if launched for _, i, _ in launched.pointers}
    if not launches or None in launches:
        return None
    for i in range(len(pointers), len(every)):
        if spans[i] and not (i in reached and _is_whole(every[i], where[i], spans[i])):
            return None
    return Plan(
        tensors[0].device,
        [(*layout(x), x.dtype, z) for x, z in (*((x, False) for x in new), *notes.scratch)],
        [launched for launched in launches if launched],
        apart,
        [i for i in written if not every[i].is_inference()],
        _builder(result, [None if x is None else next(i for i, y in enumerate(every) if y is x) for x in leaves]),
    )


def _layout(x: Tensor) -> Layout:
    return tuple(x.shape), x.stride()


def span(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    """Bytes from a tensor's first number to its last."""
    if any(n == 0 for n in shape):
        return 0
    return (sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + 1) * itemsize


def _is_whole(x: Tensor, pointer: int, size: int) -> bool:
    """Whether memory made anew with the shape and the strides of ``x`` is like that of ``x``."""
    return x.storage_offset() == 0 and x.untyped_storage().nbytes() == size and pointer % ALIGNED == 0


def _apart(
    where: list[int], spans: list[int], sizes: list[int], given: int, written: list[int]
) -> list[tuple[int, int, int, int, int | None]]:
    """What must stay apart of the tensors of a call, which are: the op has looked at them element by element.

    Args:
        spans: bytes of each; sizes: the same, or numbers of a trace.
    """
    pairs: list[tuple[int, int, int, int, int | None]] = []
    for a in written:
        for b in range(given):
            if where[a] == where[b] and sizes[a] == sizes[b]:  # one and the same, and the key says so
                continue
            distance = where[a] - where[b]
            pairs.append((a, b, sizes[a], sizes[b], distance if -spans[a] < distance < spans[b] else None))
    return pairs


def _launch(
    launched: Noted, every: list[Tensor], where: list[int], spans: list[int], given: int, *, traced: bool
) -> Launch | None:
    kernel, grid, arguments, compiled = launched
    if getattr(compiled, "packed_metadata", None) is None or not _supported():
        return None  # interpreted, or only noted
    values: list[Any] = []
    pointers, descriptors = [], []
    for place, name in enumerate(kernel.arg_names):
        value = arguments[name]
        values.append(value)
        if value.__class__ in PLAIN:
            continue
        if not isinstance(value, Tensor):
            if not hasattr(value, "block_shape"):
                continue
            found = _place(value.base.data_ptr(), where, spans, given)
            if found is None or found[1]:
                return None
            parts = {k: v for k, v in vars(value).items() if k != "base"}
            descriptors.append((place, found[0], type(value), parts))
        else:
            found = _place(value.data_ptr(), where, spans, given)
            if found is None:
                return None
            pointers.append((place, *found))
        values[place] = None
    bound = Bound(compiled, (*grid, 1, 1)[:3])
    return Launch(bound if traced else compiled[bound.grid], values, pointers, descriptors)


def _place(pointer: int, where: list[int], spans: list[int], given: int) -> tuple[int, int] | None:
    """Which tensor a pointer belongs to, and how far in; None if that is not clear."""
    if pointer in where:
        return where.index(pointer), 0
    inside = [i for i in range(given) if where[i] < pointer < where[i] + spans[i]]
    return (inside[0], pointer - where[inside[0]]) if len(inside) == 1 else None


def _builder(result: Any, places: list[int | None]) -> Callable[[list[Tensor]], Any]:
    if result is None:
        return lambda tensors: None
    if not isinstance(result, tuple):
        only = places[0] or 0
        return lambda tensors: tensors[only]
    make: Any = getattr(type(result), "_make", tuple)
    return lambda tensors: make([None if i is None else tensors[i] for i in places])


@functools.cache
def _supported() -> bool:
    """Triton from 3.6 on: before, a compiled kernel takes other arguments."""
    return tuple(map(int, sys.modules["triton"].__version__.split(".")[:2])) >= (3, 6)
