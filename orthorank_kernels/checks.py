"""Argument checks that the public ops share.

They read shapes, dtypes, devices and strides, and values only where they lie on a CPU: no check waits for a GPU.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

PACKED_NEEDS = "packed sequences come with cu_seqlens, where each begins"
FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_INTEGERS = (torch.int64, torch.int16, torch.int8, torch.uint8)
_INFINITY = float("inf")
_INT64 = 2**63


def number(
    name: str,
    value: object,
    *,
    above: float | None = None,
    at_least: float | None = None,
    none: str | None = None,
    because: str = "",
) -> None:
    """``value`` is a finite number, not a bool, a tensor or a string, and above or at least the bound given.

    Args:
        none: what None stands for, where it may be given ("head_dim ** -0.5"). because: why the bound is there.
    """
    if value is None and none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{name} is {_shown(value)}; {_wanted('a number', _bound(above, at_least), none, because)}")
    if isinstance(value, int) and not -_INT64 <= value < _INT64:  # more than torch takes for a number
        wanted = _wanted("a number", _bound(above, at_least), none, because)
        raise ValueError(f"{name} is an int of {value.bit_length()} bits; {wanted}: pass a float")
    # The comparisons are false for NaN.
    if (above is not None and not value > above) or (at_least is not None and not value >= at_least):
        raise ValueError(f"{name} is {value}; {_wanted('a number', _bound(above, at_least), none, because)}")
    if not -_INFINITY < value < _INFINITY:
        raise ValueError(f"{name} is {value}; {_wanted('a finite number', _bound(above, at_least), none, because)}")


def _bound(above: float | None, at_least: float | None) -> str:
    """Written only into errors: a compiled graph may hold a bound as a symbol, which cannot be written."""
    if above is not None:
        return f" above {above:g}"
    return "" if at_least is None else f" of at least {at_least:g}"


def integer(
    name: str,
    value: object,
    *,
    at_least: int | None = None,
    at_most: int | None = None,
    none: str | None = None,
    because: str = "",
) -> None:
    """``value`` is an int, not a bool or a float, from ``at_least`` to ``at_most``. See `number` for the others."""
    if value is None and none is not None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} is {_shown(value)}; {_wanted('an int', _bounds(at_least, at_most), none, because)}")
    # Lengths in a program that is compiled for any of them are ints of 64 bits; not every PyTorch's can be asked.
    if isinstance(value, int) and not torch.compiler.is_compiling() and not -_INT64 <= value < _INT64:
        wanted = _wanted("an int", _bounds(at_least, at_most), none, because)
        raise ValueError(f"{name} is an int of {value.bit_length()} bits; {wanted}")
    if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
        raise ValueError(f"{name} is {value}; {_wanted('an int', _bounds(at_least, at_most), none, because)}")


def flag(name: str, value: object) -> None:
    """``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {_shown(value)}; it must be True or False")


def choice(name: str, value: object, legal: Sequence[str]) -> None:
    """``value`` is one of the words in ``legal``."""
    if not isinstance(value, str) or value not in legal:
        raise ValueError(f"{name} is {_shown(value)}; it may be one of {', '.join(map(repr, legal))}")


def _bounds(at_least: int | None, at_most: int | None) -> str:
    if at_least is not None and at_most is not None:
        return f" from {at_least} to {at_most}"
    if at_least is None:
        return "" if at_most is None else f" of at most {at_most}"
    return f" of at least {at_least}"


def _wanted(kind: str, bound: str, none: str | None, because: str) -> str:
    return f"it must be {kind}{bound}" + (f", or None for {none}" if none else "") + (because and f", {because}")


def _shown(value: object) -> str:
    """A value in an error. Of a tensor not the numbers: printing them would wait for a GPU."""
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(
    name: str,
    value: object,
    layout: str,
    dtypes: Sequence[torch.dtype] = FLOATING,
    *,
    hints: Mapping[int, str] = {},
    packed: str = "",
) -> None:
    """``value`` is a tensor with the dimensions of ``layout`` (such as ``"[batch, hidden]"``) and one of ``dtypes``.

    Args:
        hints: what to do, by a wrong number of dimensions that is likely to mean something.
        packed: the other layout that the op takes in this place.
    """
    if not isinstance(value, torch.Tensor):
        of = f"an {_names(dtypes)}" if dtypes == (torch.int32,) else "a"
        cure = f": pass torch.tensor({name}, dtype={dtypes[0]}, device=...)" if len(dtypes) == 1 else ""
        cure = cure if isinstance(value, (list, tuple, int, float)) else ""
        raise TypeError(f"{name} is {type_of(value)}; it must be {of} tensor {layout}{cure}")
    if value.layout is not torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        raise TypeError(
            f"{name} is a {kind} tensor; it must be a dense one {layout}: pad it, or pass {name}.to_dense()"
        )
    dims = layout.count(",") + 1
    if value.dim() != dims:
        hint = hints.get(value.dim(), "")
        also = f", or {packed}" if packed else ""
        raise ValueError(
            f"{name} has shape {list(value.shape)}; it must be {layout}, {dims} dimension{'s' * (dims > 1)}{also}"
            f"{hint and f': {hint}'}"
        )
    if value.dtype not in dtypes:
        raise TypeError(
            f"{name} has dtype {_names((value.dtype,))}; it may be {_names(dtypes)}{_cast(name, value.dtype, dtypes)}"
        )


def _cast(name: str, given: torch.dtype, dtypes: Sequence[torch.dtype]) -> str:
    """What to do where a tensor has a wrong dtype and its numbers may be meant; bytes may be another dtype's."""
    if dtypes == (torch.int32,):
        return f": pass {name}.int()" if given in _INTEGERS else ""
    if given == torch.uint8 and torch.float8_e4m3fn in dtypes:
        return f": if its bytes are float8, pass {name}.view(torch.float8_e4m3fn)"
    if not given.is_floating_point:
        return ""
    return f": pass {name}.float()" if dtypes == (torch.float32,) else ": convert it with .to(dtype)"


def type_of(value: object) -> str:
    """The type of what is no tensor, with its article."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeio' or name == 'ndarray' else 'a'} {name}"


def shape(name: str, value: torch.Tensor, expected: Sequence[int], because: str, hint: str = "") -> None:
    """``value`` has exactly the shape ``expected``; ``because`` names the argument that asks for it."""
    if list(value.shape) != list(expected):
        end = hint and f": {hint}"
        raise ValueError(f"{name} has shape {list(value.shape)}; {because} asks for {list(expected)}{end}")


def same_device(reference_name: str, reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """All given tensors live on the device of ``reference``."""
    for name, value in others.items():
        if value is not None and value.device != reference.device:
            raise ValueError(
                f"{name} is on {value.device} and {reference_name} on {reference.device}; move one with .to(device)"
            )


def same_dtype(reference_name: str, reference: torch.Tensor, **others: torch.Tensor | None) -> None:
    """All given tensors have the dtype of ``reference``."""
    for name, value in others.items():
        if value is not None and value.dtype != reference.dtype:
            raise TypeError(
                f"{name} has dtype {str(value.dtype).removeprefix('torch.')} and {reference_name} "
                f"{str(reference.dtype).removeprefix('torch.')}; convert one with .to(dtype)"
            )


def unit_last_stride(**tensors: torch.Tensor) -> None:
    """The last dimension of each tensor is contiguous; every other stride is honoured by the kernels."""
    for name, value in tensors.items():
        if value.shape[-1] > 1 and value.stride(-1) != 1:
            raise ValueError(
                f"{name} has strides {list(value.stride())}; the last one must be 1: "
                f"pass {name}.contiguous(), or keep the last dimension innermost"
            )


def row_index(name: str, value: object, batch: int, like: torch.Tensor, packed: bool = False) -> None:
    """``value`` is an int32 tensor ``[batch]`` (starts, lengths, sink_positions, ...) on the device of ``like``."""
    tensor(name, value, "[seqs]" if packed else "[batch]", (torch.int32,))
    assert isinstance(value, torch.Tensor)
    if value.shape[0] != batch:
        each = "sequence" if packed else "row of the batch"
        raise ValueError(f"{name} has shape {list(value.shape)}; it must be [{batch}], one entry for each {each}")
    unit_last_stride(**{name: value})
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device} like the other tensors")


def positions(value: object, batch: int | None, like: torch.Tensor) -> None:
    """``positions`` is int32 ``[batch, selected]``, ``[selected]`` if ``batch`` is None, on the device of ``like``."""
    tensor("positions", value, "[selected]" if batch is None else "[batch, selected]", (torch.int32,))
    assert isinstance(value, torch.Tensor)
    if batch is not None and value.shape[0] != batch:
        raise ValueError(f"positions has shape {list(value.shape)}; its first dimension must be the batch, {batch}")
    if value.device != like.device:
        raise ValueError(f"positions is on {value.device}; it must be on {like.device} like the other tensors")
    unit_last_stride(positions=value)


def positions_inside(value: torch.Tensor, tokens: int, of: str) -> None:
    """No position is past the token axis of ``of``. Seen on a CPU, where looking is free."""
    if not readable(value) or value.numel() == 0:
        return
    largest = int(value.max())
    if largest >= tokens:
        legal = f"from 0 to {tokens - 1}, or -1 for no token" if tokens else "-1, no token"
        raise IndexError(
            f"positions holds {largest}, and {of} has {tokens} tokens; each must be {legal}: they count from the first "
            f"token of {of}, not from that of a longer sequence"
        )


def output(name: str, value: object, expected: Sequence[int], dtype: torch.dtype, like: torch.Tensor) -> None:
    """``value`` can take an op's output: shape ``expected``, ``dtype``, the device of ``like``, contiguous."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {type_of(value)}; it must be a tensor to write the op's output to")
    shape(name, value, expected, "the op's output")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {str(value.dtype).removeprefix('torch.')}; it must be {_names((dtype,))}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it must be on {like.device} like the other tensors")
    if not value.is_contiguous():
        raise ValueError(f"{name} has strides {list(value.stride())}; an output must be contiguous")


def no_overlap(name: str, value: torch.Tensor) -> None:
    """No two elements of ``value`` share memory, so that whatever order they are written in gives one result."""
    inner_first: list[int] = []
    for dim in range(value.dim()):  # insertion, because `sorted` cannot be traced when strides are symbolic
        if value.shape[dim] == 0:
            return
        if value.shape[dim] == 1:
            continue
        place = len(inner_first)
        while place > 0 and value.stride(inner_first[place - 1]) > value.stride(dim):
            place -= 1
        inner_first.insert(place, dim)
    span = 1
    for dim in inner_first:
        if value.stride(dim) < span:
            raise ValueError(
                f"{name} has shape {list(value.shape)} and strides {list(value.stride())}; a stride smaller than what "
                f"it steps over makes elements share memory, and it is written to: pass {name}.clone()"
            )
        span += value.stride(dim) * (value.shape[dim] - 1)


def apart(name: str, value: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """``value``, which is written to, and ``other`` share no memory."""
    if is_inside_func(value, other) or value.numel() == 0 or other.numel() == 0 or not _share(value, other):
        return
    raise ValueError(
        f"{name} shares memory with {other_name}, which is read while {name} is written: pass other memory, or "
        f"{other_name}.clone()"
    )


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether elements of two tensors lie in the same bytes, from storages and strides alone.

    Rows that alternate in memory, as slices of one projection do, are apart. Where the answer would be a search
    (strides that do not divide each other) it is that they share.
    """
    if a.untyped_storage()._cdata != b.untyped_storage()._cdata:
        return False
    (begin, end, run, steps), (other_begin, other_end, other_run, other_steps) = _extent(a), _extent(b)
    if end <= other_begin or other_end <= begin:
        return False
    period = math.gcd(*steps, *other_steps)
    shift = (other_begin - begin) % period if period else other_begin - begin
    return not period or shift < run or shift + other_run > period


def _extent(x: torch.Tensor) -> tuple[int, int, int, list[int]]:
    """First byte, end, length of the runs without gaps, and the steps between these."""
    size = x.element_size()
    dims = sorted((x.stride(d) * size, x.shape[d]) for d in range(x.dim()) if x.shape[d] > 1)
    run, steps = size, []
    for step, count in dims:
        if step == run:
            run *= count
        elif step > 0:
            steps.append(step)
    begin = int(x.storage_offset()) * size
    return begin, begin + int(sum(step * (count - 1) for step, count in dims)) + size, run, steps


def is_inside_func(*values: torch.Tensor) -> bool:
    """Whether some value is a wrapper of `torch.func` or ``torch.vmap``, or a compiler only traces the call."""
    return torch.compiler.is_compiling() or any(torch._C._functorch.is_functorch_wrapped_tensor(v) for v in values)


def readable(*values: torch.Tensor | None, anywhere: bool = False) -> bool:
    """Whether values can be looked at for nothing: real tensors on a CPU, outside tracing and `torch.func`.

    Args:
        anywhere: whether the caller waits for tensors on another device; those on "meta" hold nothing.
    """
    return not torch.compiler.is_compiling() and all(
        value is None
        or (
            type(value) is torch.Tensor
            and (value.device.type == "cpu" or (anywhere and value.device.type != "meta"))
            and not torch._C._functorch.is_functorch_wrapped_tensor(value)
        )
        for value in values
    )


def boundaries(name: str, value: torch.Tensor, most: int, of: str) -> None:
    """``value`` says where sequences begin and end on an axis of ``most``: from 0, never falling. Seen on a CPU."""
    if not readable(value):
        return
    ends = value.tolist()
    falls = next((i for i, (a, b) in enumerate(pairwise(ends)) if b < a), None)
    if ends[0] != 0:
        raise ValueError(f"{name} begins with {ends[0]}; it must begin with 0, where the first sequence does")
    if falls is not None:
        raise ValueError(f"{name} falls from {ends[falls]} to {ends[falls + 1]}; no sequence ends before it begins")
    if ends[-1] > most:
        raise ValueError(f"{name} ends with {ends[-1]}; {of} has {most}")


def kind_of(value: object) -> str:
    """What was given where a tuple of a certain length is wanted."""
    return f"a tuple of {len(value)}" if isinstance(value, (tuple, list)) else type_of(value)
