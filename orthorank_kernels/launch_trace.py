"""A launch plan for all lengths: made of one call, for the calls of its kind, whatever their numbers are.

The numbers of a call are the sizes and strides of its tensors and its ints. One call of a kind goes the long way a
second time, without launching, and they write a program meanwhile (`launch_numbers`): from arguments through checks and
settings to the grid, and to what Triton asks of an int to choose the compiled kernel. Its result is the call's launch
plan. Run with the numbers of another call of the kind it gives that call's plan, or None where that call would have
gone another way.

So nothing is derived that the long way does not compute, and nothing is assumed of a launcher. What cannot be traced,
such as a slice, makes no program; then there are plans for single calls alone (`launch_plan`).
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from orthorank_kernels.launch_numbers import Number, Program, exact, value_of

INT32 = 2**31
ALIGNED = 16  # what Triton compiles for, of ints and of addresses
Layout = tuple[tuple[Any, ...], tuple[Any, ...]]  # shape and strides


class UntraceableError(Exception):
    """A call does something with lengths that no program can be written of."""


class Trace(TorchFunctionMode):
    """While it is entered, the tensors that it knows tell their sizes as numbers, and nothing is launched.

    Args:
        numbers: of the call; launches: what it launched, `launch_notes.Noted`.
    """

    def __init__(self, numbers: Sequence[int], launches: Sequence[Any]):
        super().__init__()
        self.program = Program(numbers)
        self.launches = iter(launches)
        self.made: set[int] = set()  # storages
        self.layouts: dict[int, tuple[Tensor, Layout]] = {}  # by id; the tensor, so that no other has its id

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A call's arguments with numbers for its ints; their order is that of the key of a launch plan."""
        numbers = iter(self.program.numbers)

        def take(value: Any) -> Any:
            if type(value) is int:
                return next(numbers)
            for x in value if type(value) is tuple else (value,):
                if isinstance(x, Tensor):
                    shape, strides = (tuple(next(numbers) for _ in range(x.dim())) for _ in range(2))
                    if id(x) in self.layouts and self.layout(x) != (shape, strides):  # which asks, number by number
                        raise UntraceableError("one tensor has two shapes")
                    self.layouts[id(x)] = x, (shape, strides)
            return value

        return tuple(map(take, args)), {name: take(value) for name, value in kwargs.items()}

    def layout(self, x: Tensor) -> Layout:
        """Shape and strides, which are those of all calls where ``x`` is not known."""
        return self.layouts[id(x)][1] if id(x) in self.layouts else (tuple(x.shape), x.stride())

    def learn(self, x: Tensor, shape: Sequence[Any], strides: Sequence[Any]) -> Tensor:
        """``x`` has this layout, in numbers."""
        if (tuple(map(value_of, shape)), tuple(map(value_of, strides))) != (tuple(x.shape), x.stride()):
            raise UntraceableError(f"a tensor {list(x.shape)} with strides {list(x.stride())} was told to be another")
        self.layouts[id(x)] = x, (tuple(shape), tuple(strides))
        return x

    def make(self, x: Tensor, shape: Sequence[Any], strides: Sequence[Any]) -> Tensor:
        """``x`` is new memory with this layout."""
        self.made.add(x.untyped_storage()._cdata)
        return self.learn(x, shape, strides)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function in _TRACED:
            return _TRACED[function](self, function, *args, **kwargs)
        if function not in _WITHOUT_LENGTHS and any(map(self._tells, (*args, *kwargs.values()))):
            raise UntraceableError(f"{getattr(function, '__name__', function)} is not traced")
        return function(*args, **kwargs)

    def _tells(self, x: Any) -> bool:
        if type(x) in (tuple, list):
            return any(map(self._tells, x))
        return type(x) is Number or id(x) in self.layouts

    def launch(self, kernel: Any, grid: tuple[Any, ...], arguments: dict[str, Any]) -> Any:
        """The compiled kernel that the call launched here, after asking what Triton asks to find it."""
        kernel_then, grid_then, arguments_then, compiled = next(self.launches)
        now, then = ((k, g, _without_tensors(a)) for k, g, a in (
            (kernel, value_of(grid), arguments), (kernel_then, grid_then, arguments_then)
        ))  # fmt: skip
        if now != then:
            raise UntraceableError(f"the call launched {then}, not {now}")
        given = {parameter.name: parameter for parameter in getattr(kernel, "params", ())}
        for name, value in arguments.items():
            if type(value) is not Number:
                continue
            parameter = given.get(name)
            if parameter is None or parameter.is_constexpr:  # an option of the compiler, a constant of the kernel
                value.exact()
                continue
            for bound in (-INT32, INT32, 2 * INT32 * INT32):  # the types of ints
                self.program.compare("<", operator.lt, value, bound)
            if not parameter.do_not_specialize and value != 1:
                self.program.compare("==", operator.eq, value % ALIGNED, 0)
        return compiled

    def forget(self) -> None:
        """Let go of tensors, which would stay until Python looks for circles."""
        self.layouts.clear()
        self.program = Program([])


def _without_tensors(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value_of(value) for name, value in arguments.items() if isinstance(value, (int, float, str))}


def _shape(trace: Trace, function: Any, x: Tensor) -> Any:
    return trace.layout(x)[0]


def _size(trace: Trace, function: Any, x: Tensor, dim: int | None = None) -> Any:
    return trace.layout(x)[0] if dim is None else trace.layout(x)[0][dim]


def _stride(trace: Trace, function: Any, x: Tensor, dim: int | None = None) -> Any:
    return trace.layout(x)[1] if dim is None else trace.layout(x)[1][dim]


def _numel(trace: Trace, function: Any, x: Tensor) -> Any:
    return _product(trace.layout(x)[0])


def _product(sizes: Sequence[Any]) -> Any:
    count: Any = 1
    for n in sizes:
        count = n * count
    return count


def _is_contiguous(trace: Trace, function: Any, x: Tensor) -> bool:
    shape, strides = trace.layout(x)
    dense = all(n == 1 or step == wanted for n, step, wanted in zip(shape, strides, _dense(shape), strict=True))
    return dense or _product(shape) == 0


def _dense(shape: Sequence[Any]) -> tuple[Any, ...]:
    strides: list[Any] = []
    step: Any = 1
    for n in reversed(shape):
        strides.insert(0, step)
        step = max(n, 1) * step
    return tuple(strides)


def _made(trace: Trace, function: Any, *args: Any, **kwargs: Any) -> Tensor:
    """`torch.empty`, and what makes a tensor like the first argument. Nothing is filled, which would be a launch."""
    function = _T.new_empty if function is _T.new_zeros else function
    like, sizes = ((args[0],), args[1:]) if isinstance(args[0], Tensor) else ((), args)
    shape = sizes[0] if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes
    return trace.make(function(*like, value_of(tuple(shape)), **kwargs), shape, _dense(shape))


def _made_like(trace: Trace, function: Any, x: Tensor, *, memory_format: Any, **kwargs: Any) -> Tensor:
    if memory_format is not torch.contiguous_format:
        raise UntraceableError("memory like another's")
    shape = trace.layout(x)[0]
    return trace.make(function(x, memory_format=memory_format, **kwargs), shape, _dense(shape))


def _made_permuted(trace: Trace, function: Any, shape: Any, order: Any, **kwargs: Any) -> Tensor:
    strides = dict(zip(order, _dense([shape[dim] for dim in order]), strict=True))
    return trace.make(function(value_of(tuple(shape)), order, **kwargs), shape, [strides[d] for d in range(len(shape))])


def _unsqueezed(trace: Trace, function: Any, x: Tensor, dim: int) -> Tensor:
    shape, strides = map(list, trace.layout(x))
    dim %= len(shape) + 1
    strides.insert(dim, shape[dim] * strides[dim] if dim < len(shape) else 1)
    shape.insert(dim, 1)
    return trace.learn(function(x, dim), shape, strides)


def _squeezed(trace: Trace, function: Any, x: Tensor, dim: int) -> Tensor:
    shape, strides = map(list, trace.layout(x))
    if shape[dim] == 1:
        del shape[dim], strides[dim]
    return trace.learn(function(x, dim), shape, strides)


def _transposed(trace: Trace, function: Any, x: Tensor, a: int, b: int) -> Tensor:
    shape, strides = map(list, trace.layout(x))
    for numbers in (shape, strides):
        numbers[a], numbers[b] = numbers[b], numbers[a]
    return trace.learn(function(x, a, b), shape, strides)


def _viewed(trace: Trace, function: Any, x: Tensor, dtype: Any) -> Tensor:
    if not isinstance(dtype, torch.dtype) or dtype.itemsize != x.element_size():
        raise UntraceableError("a view of another shape")
    return trace.learn(function(x, dtype), *trace.layout(x))


def _narrowed(trace: Trace, function: Any, x: Tensor, dim: int, start: Any, length: Any) -> Tensor:
    if x.untyped_storage()._cdata in trace.made:
        raise UntraceableError("a part of new memory")
    shape, strides = map(list, trace.layout(x))
    shape[dim] = length
    if start != 0:  # where it begins must follow from the numbers, too
        exact(strides[dim])
    return trace.learn(function(x, dim, exact(start), value_of(length)), shape, strides)


_T: Any = torch.Tensor
_TRACED: dict[Any, Callable[..., Any]] = {
    _T.shape.__get__: _shape, _T.size: _size, _T.stride: _stride, _T.numel: _numel, _T.is_contiguous: _is_contiguous,
    torch.empty: _made, _T.new_empty: _made, _T.new_zeros: _made, torch.empty_like: _made_like,
    torch.empty_permuted: _made_permuted, _T.unsqueeze: _unsqueezed, _T.squeeze: _squeezed, _T.transpose: _transposed,
    _T.view: _viewed, _T.narrow: _narrowed,
}  # fmt: skip
# Where memory begins, and who owns it, is asked of each call anew: `launch_notes.Plan.fits`, and the key.
_WITHOUT_LENGTHS = {
    *(getattr(_T, name).__get__ for name in (
        "dtype", "device", "layout", "ndim", "is_nested", "is_cuda", "requires_grad", "is_leaf", "_base",
    )),
    _T.dim, _T.element_size, _T.get_device, _T._is_view, _T.is_neg, _T.is_inference, _T.is_floating_point, _T.data_ptr,
    _T.storage_offset, _T.untyped_storage,
}  # fmt: skip
