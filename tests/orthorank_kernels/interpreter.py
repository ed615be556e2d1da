"""Repairs bfloat16 in Triton's interpreter.

The interpreter keeps bfloat16 as uint16 bit patterns: `tl.dot`, arithmetic and sums work on those patterns, and a
conversion from float32 truncates. A GPU does none of this. The repair widens bfloat16 to float32 before an operation
and rounds to nearest even after it. It wraps the interpreter's builder, so it is for tests only.
"""

from typing import Any

import numpy as np


def repair_bfloat16() -> None:
    """Make bfloat16 under the interpreter behave as on a GPU. Calling it twice is harmless."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if getattr(builder, "_bfloat16_is_repaired", False):
        return
    handle_type = interpreter.TensorHandle

    def is_bfloat16(handle: Any) -> bool:
        return isinstance(handle, handle_type) and handle.dtype.scalar == tl.bfloat16

    def widen(handle: Any) -> Any:
        if not is_bfloat16(handle):
            return handle
        return handle_type((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrow(data: np.ndarray) -> Any:
        return handle_type(round_to_bfloat16(data), tl.bfloat16)

    _wrap_arithmetic(builder, is_bfloat16, widen, narrow, handle_type, tl)
    _wrap_conversions(builder, is_bfloat16, widen, narrow, tl)
    _wrap_sum(interpreter.ReduceOps, is_bfloat16, widen, narrow)
    builder._bfloat16_is_repaired = True


def round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """Bit patterns (uint16) of ``data`` rounded to nearest even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(data), (bits >> 16) | np.uint32(0x40), rounded).astype(np.uint16)


def _wrap_arithmetic(builder: Any, is_bfloat16: Any, widen: Any, narrow: Any, handle_type: Any, tl: Any) -> None:
    binary, unary, ternary, dot = builder.binary_op, builder.unary_op, builder.ternary_op, builder.create_dot

    def result(data: np.ndarray) -> Any:
        return handle_type(data, tl.int1) if data.dtype == np.bool_ else narrow(data)

    def binary_op(lhs: Any, rhs: Any, op: Any) -> Any:
        on_bits = getattr(op, "__name__", "").startswith("bitwise")
        if is_bfloat16(lhs) and is_bfloat16(rhs) and not on_bits:
            return result(op(widen(lhs).data, widen(rhs).data))
        return binary(lhs, rhs, op)

    def unary_op(arg: Any, op: Any) -> Any:
        return narrow(op(widen(arg).data)) if is_bfloat16(arg) else unary(arg, op)

    def ternary_op(lhs: Any, rhs: Any, other: Any, op: Any) -> Any:
        if is_bfloat16(rhs) and op is not np.where:  # `where` moves bits and needs no repair
            return narrow(op(widen(lhs).data, widen(rhs).data, widen(other).data))
        return ternary(lhs, rhs, other, op)

    builder.binary_op, builder.unary_op, builder.ternary_op = binary_op, unary_op, ternary_op
    builder.create_dot = lambda a, b, acc, *options: dot(widen(a), widen(b), acc, *options)


def _wrap_conversions(builder: Any, is_bfloat16: Any, widen: Any, narrow: Any, tl: Any) -> None:
    cast = builder.cast_impl

    def cast_impl(source: Any, target: Any) -> Any:
        if is_bfloat16(source) and target.scalar != tl.bfloat16:
            return cast(widen(source), target)
        if target.scalar == tl.bfloat16 and not is_bfloat16(source):
            return narrow(source.data.astype(np.float32))
        return cast(source, target)

    builder.cast_impl = cast_impl


def _wrap_sum(reduce_ops: Any, is_bfloat16: Any, widen: Any, narrow: Any) -> None:
    plain = reduce_ops.sum

    def summed(self: Any, value: Any) -> Any:
        if not is_bfloat16(value.handle):
            return plain(self, value)
        total = np.sum(widen(value.handle).data, axis=self.axis, keepdims=self.keep_dims)
        return self.to_tensor(narrow(np.asarray(total)).data, value.dtype)

    reduce_ops.sum = summed
