"""What a call of an op on a GPU needs of the host, made once for each kind of call: its launch plan.

Without a plan a call goes the long way: arguments are checked, a backend is chosen, settings are looked up, memory is
made, Triton finds the kernel. When a call of one kind comes a second time its launches are noted, and a plan is what
they leave: what memory to make, which compiled kernel with which grid and numbers, and which tensor each pointer
belongs to. From then on a call like it, of which the key is the same, only does that. What another call of its kind
has to do, with other lengths, follows from how the numbers of this one were computed (`launch_trace`). PyTorch's
operator is left out from the first call on, where nothing is there that would see it, which pays for making the key.

The key holds all that the long way looks at; what is left of it without its numbers is the call's kind:

- of each tensor: shape and strides, dtype, device, whether its memory is aligned to 16 bytes, which tensors are one;
- each other argument, by type and value; which are given by name;
- launch settings (`settings.lookup.generation`) and the environment variables that are read at each call;
- of what is written to: whether PyTorch lets it be, here and now.

What a key cannot hold, the call is asked: whether memory that is written to shares bytes with the rest. A call of any
other kind has no plan and goes the long way: tensors that are no plain ones on a GPU, gradients, tracing, tensors
negated when read, dispatch modes and profilers, which want to see operators. So does all that no plan can be made of,
such as results that no kernel has written to.

Plans are for Triton from 3.6 on and for NVIDIA: on AMD, what is compiled depends on the size of a tensor's storage.
What Triton is told of how to compile (`TRITON_DEBUG`, `triton.knobs`) counts until a plan is made, and after `forget`.
With `ORTHORANK_LAUNCH_PLANS=0` in the environment every call goes the long way.
"""

import functools
import inspect
import itertools
import os
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from orthorank_kernels.launch_notes import PLAIN, TENSORS, THREAD, Notes, Plan, plan_of
from orthorank_kernels.launch_trace import ALIGNED, Trace, UntraceableError
from orthorank_kernels.settings import lookup

P = ParamSpec("P")
R = TypeVar("R")

DEVICES = set() if torch.version.hip else {"cuda"}  # kinds of devices that calls are planned for
MOST = 512  # plans, and kinds of calls, of all ops together
WAYS = 16  # that calls of one kind may go, by their numbers
WRITTEN = ("out", "k_cache", "v_cache")  # what an op's first arguments are called that it writes to
VARIABLES = ("TRITON_INTERPRET", "ORTHORANK_AUTOTUNE", "ORTHORANK_ATTENTION")  # read at each call
SWITCH = "ORTHORANK_LAUNCH_PLANS"
# What stands behind os.environ, where it can be seen: asking that for a name that is not there takes a microsecond.
_ENVIRON: Any = getattr(os.environ, "_data", os.environ)
_NAMES: list[Any] = [n if _ENVIRON is os.environ else os.environ.encodekey(n) for n in (*VARIABLES, SWITCH)]
_SWITCH = _NAMES.pop()
_Key = tuple[tuple[Any, ...], tuple[int, ...]]  # a call's kind, and its numbers
_Seen = tuple[_Key, list[Tensor], list[int], list[int]]
Program = Callable[..., Plan | None]
# None: seen once, and a plan is worth making when such a call comes again. False: none can be made.
_PLANS: dict[_Key, Plan | bool | None] = {}
# From a call's numbers to its plan, for each way that a kind goes; empty: seen once. None: it cannot be traced.
_KINDS: dict[tuple[Any, ...], list[Program] | None] = {}


def forget() -> None:
    """Make all plans anew, as after a kernel's module was reloaded."""
    _PLANS.clear()
    _KINDS.clear()


def planned(op: Callable[P, R]) -> Callable[P, R]:
    """A public op with launch plans. It writes to its argument ``out``, a tensor or a tuple of them, or to its first
    one or two, which have names of `WRITTEN`.
    """
    changed = tuple(itertools.takewhile(WRITTEN.__contains__, inspect.signature(op).parameters))

    @functools.wraps(op)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        seen = None if torch.compiler.is_compiling() else _look(op, args, kwargs, changed)
        if seen is None:
            return op(*args, **kwargs)
        key, tensors, pointers, _ = seen
        plan = _PLANS.get(key)
        if plan is None:
            ways: Any = _KINDS.get(key[0], False)
            plan = _of_its_kind(key, ways or ())
            if plan is None:
                return _the_long_way(op, args, kwargs, seen, ways)
        if plan.__class__ is Plan and plan.fits(pointers):
            return plan.run(tensors, pointers)
        return _plainly(op, args, kwargs)

    return call


def _look(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], changed: tuple[str, ...]) -> _Seen | None:
    """Key of a call, its tensors, where their memory is, and the places of those written to; None: it has no plan."""
    if THREAD.notes is not None or torch._C._len_torch_dispatch_stack() or torch.autograd._profiler_enabled():
        return None
    if torch._C._is_tracing() or forward_ad._current_level >= 0 or _ENVIRON.get(_SWITCH) in ("0", b"0"):
        return None
    graph = torch.is_grad_enabled()
    kinds: list[Any] = [op, lookup.generation, len(args), tuple(kwargs), *map(_ENVIRON.get, _NAMES)]
    numbers: list[int] = []
    tensors: list[Tensor] = []
    pointers: list[int] = []
    written: list[int] = []
    if changed:
        out = args[0] if args else kwargs.get(changed[0])
        other = args[len(changed) - 1] if len(args) >= len(changed) else kwargs.get(changed[-1])
    else:
        out = other = kwargs.get("out")
    for value in (*args, *kwargs.values()):
        kind = value.__class__
        if kind in TENSORS:
            group: Any = (value,)
        elif kind in PLAIN:
            kinds.append(kind)  # 1, 1.0 and True are one key
            if kind is int:
                numbers.append(value)
            else:
                kinds.append(value or str(value))  # and so are 0.0 and -0.0
            continue
        elif value is out and kind is tuple:
            group = value
            kinds.append(len(group))
        else:
            return None
        for x in group:
            if x is None and kind is tuple:
                kinds.append(None)
                continue
            if x.__class__ not in TENSORS:
                return None
            device = x.device
            if not tensors and device.type not in DEVICES:  # the others are on the same, or there is an error
                return None
            if x.is_neg() or (graph and x.requires_grad):
                return None
            if value is out or value is other:
                written.append(len(tensors))
                kinds.append((x.is_inference(), torch.is_inference_mode_enabled()))
            try:
                pointer = x.data_ptr()
                shape = x.shape
                numbers += shape
                numbers += x.stride()
                kinds += (len(shape), x.dtype, device, pointer % ALIGNED == 0)
            except RuntimeError:  # of another layout, or within torch.func
                return None
            tensors.append(x)
            pointers.append(pointer)
    if len(set(pointers)) < len(pointers):
        kinds += map(pointers.index, pointers)
    return (tuple(kinds), tuple(numbers)), tensors, pointers, written


def _of_its_kind(key: _Key, ways: Iterable[Program]) -> Plan | None:
    """The plan that follows from that of another call."""
    for program in ways:
        plan = program(*key[1])
        if plan is not None:
            _remember(_PLANS, key, plan)
            return plan
    return None


def _the_long_way(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: _Seen, ways: Any) -> Any:
    """Call ``op`` itself, and make a plan for all numbers of the second call of a kind, and of each that goes another
    way than those before. Where that is not possible, the second call with the same numbers makes a plan for those.

    Args:
        ways: what `_KINDS` has, or False.
    """
    key = seen[0]
    if ways is False:
        _remember(_KINDS, key[0], [])
        return _plainly(op, args, kwargs)
    if ways is not None and len(ways) >= WAYS:
        ways = None
    if ways is None and key not in _PLANS:
        _remember(_PLANS, key, None)
        return _plainly(op, args, kwargs)
    notes = Notes()
    result = _noted(notes, op, args, kwargs)
    plan = plan_of(notes, result, *seen[1:])
    if key[0][1] == lookup.generation:  # else settings were measured meanwhile
        _remember(_PLANS, key, plan or False)
        if ways is not None:
            try:
                ways.append(_program(op, args, kwargs, seen, notes) if plan else _no_plan)
            except Exception:  # whatever it is, the call itself is done
                _remember(_KINDS, key[0], None)
    return result


def _noted(notes: Notes, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    THREAD.notes = notes
    try:
        return _plainly(op, args, kwargs)
    finally:
        THREAD.notes = None


def _plainly(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call ``op`` without PyTorch's operator around its launch: nothing is there that would see one (`_look`)."""
    before, THREAD.plain = THREAD.plain, True
    try:
        return op(*args, **kwargs)
    finally:
        THREAD.plain = before


def _program(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], seen: _Seen, notes: Notes) -> Program:
    """What gives the plan of a call from its numbers, made by tracing this one, whose launches were noted."""
    numbers = seen[0][1]
    trace = Trace(numbers, notes.launches)
    try:
        traced = Notes(trace)
        with trace:
            result = _noted(traced, op, *trace.arguments(args, kwargs))
        program = trace.program.function(plan_of(traced, result, *seen[1:]))
        if program(*numbers) is None:
            raise UntraceableError("its own numbers go another way")
        return program
    finally:
        trace.forget()


def _no_plan(*numbers: int) -> None:
    """Of a way that no plan can be made of."""


def _remember(known: dict[Any, Any], key: tuple[Any, ...], value: Any) -> None:
    if len(known) >= MOST:
        known.clear()
    known[key] = value
