"""Floating-point instructions (PTX ISA 9.7.3 to 9.7.5). `add` and its kin are shared with the integers by type.

Approximate instructions (ex2, rsqrt, div.full ...) give the rounded exact value; a GPU may be a few units in the last
place away, as the ISA says for each.
"""

from collections.abc import Callable

import numpy as np

from ptx_check.bits import canonical, fma, fma_to_odd, halves, narrow, narrow_odd, pack, widen_bfloat16
from ptx_check.decode import Instruction
from ptx_check.operands import Operands
from ptx_check.ops_integer import INTEGERS, ONE_OPERAND, integer_arithmetic
from ptx_check.table import Run, compute, entry, modifiers, unknown

PACKED = ("f16x2", "bf16x2", "f32x2")
SCALARS = ("f16", "bf16", "f32")
_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def maximum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The operand that is a number, if one is not; +0 is above -0."""
    equal = np.where(np.signbit(x), y, x)
    return np.where(np.isnan(x), y, np.where(np.isnan(y), x, np.where(x == y, equal, np.maximum(x, y))))


def minimum(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -maximum(-x, -y)


def flush(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of the same sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def flushing(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """With arguments and result flushed."""
    return lambda *x: flush(function(*map(flush, x)))


@entry("add", "sub", "mul", "min", "max", "neg", "abs")
def _arithmetic(instruction: Instruction, operands: Operands) -> Run:
    name, kind = instruction.opcode[0], instruction.opcode[-1]
    if kind in INTEGERS:
        return integer_arithmetic(instruction, operands)
    if instruction.opcode[1:3] == ("rn", "f32") and kind in ("f16", "bf16") and name in ("add", "sub"):
        # A half and a float32 (sm_100).
        up, single = widen_bfloat16 if kind == "bf16" else (lambda x: x.astype(np.float32)), _ARITHMETIC[name]
        mixed = lambda x, y: canonical(single(up(x), y), "f32")  # noqa: E731
        return compute(instruction, operands, mixed, "f32", kind, "f32")
    words = modifiers(
        instruction, kind, *(("rn", "ftz") if name in _ARITHMETIC else ("NaN",) if name in ("min", "max") else ())
    )
    count = 1 if name in ONE_OPERAND else 2
    if name in _ARITHMETIC and kind in PACKED and "ftz" not in words:
        function = _ARITHMETIC[name]
        return compute(
            instruction,
            operands,
            lambda *x: pack(canonical(function(*(halves(one, kind) for one in x)), "f32"), kind),
            kind,
            *([kind] * count),
            by_halves=True,
        )
    if kind not in SCALARS or (kind != "f32" and name in ("neg", "abs")):
        raise unknown(instruction)
    if name in ("neg", "abs"):
        bits = np.uint32(0x80000000)
        change = (lambda x: x ^ bits) if name == "neg" else (lambda x: x & ~bits)
        return compute(instruction, operands, change, "b32", "b32")
    if "ftz" in words:
        if kind != "f32":
            raise unknown(instruction)
        function = flushing(_ARITHMETIC[name])
    elif name in _ARITHMETIC:
        function = _ARITHMETIC[name]
    else:
        numbers = {"min": minimum, "max": maximum}[name]
        spread = {"min": np.minimum, "max": np.maximum}[name]  # of signed zeros, as `numbers`; of NaN, NaN
        function = (
            (lambda x, y: np.where(np.isnan(x) | np.isnan(y), spread(x, y), numbers(x, y)))
            if "NaN" in words
            else numbers
        )
        if kind == "f32" and len(instruction.operands) == 4:  # of three numbers (sm_100)
            two, count = function, 3
            function = lambda x, y, z: two(two(x, y), z)  # noqa: E731
    return compute(instruction, operands, _in_single(function, kind), kind, *([kind] * count))


def _in_single(function: Callable[..., np.ndarray], kind: str) -> Callable[..., np.ndarray]:
    """Computed in float32 and rounded once more: right for f16 and bf16, which have less than half of its bits."""
    if kind == "f32":
        return lambda *x: canonical(function(*x), "f32")
    if kind == "f16":
        return lambda *x: narrow(function(*(one.astype(np.float32) for one in x)), kind)
    return lambda *x: narrow(function(*(widen_bfloat16(one) for one in x)), kind)


@entry("fma")
def _fused(instruction: Instruction, operands: Operands) -> Run:
    """One rounding. ``fma.rn.f32.bf16`` multiplies bf16 and adds float32 (sm_100)."""
    *words, kind = instruction.opcode[1:]
    if words == ["rn"] and kind == "f32":
        return compute(instruction, operands, lambda x, y, z: canonical(fma(x, y, z), "f32"), kind, kind, kind, kind)
    if words == ["rn", "ftz"] and kind == "f32":
        return compute(instruction, operands, lambda *x: canonical(flushing(fma)(*x), "f32"), kind, kind, kind, kind)
    if words == ["rn"] and kind in PACKED:

        def packed(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
            exact = fma_to_odd(halves(x, kind), halves(y, kind), halves(z, kind))
            result = narrow_odd(exact.reshape(-1), kind)
            return np.ascontiguousarray(canonical(result, "f32") if kind == "f32x2" else result).view(x.dtype)

        return compute(instruction, operands, packed, kind, kind, kind, kind, by_halves=True)
    if words == ["rn"] and kind in ("f16", "bf16"):
        up = widen_bfloat16 if kind == "bf16" else (lambda x: x)
        function = lambda x, y, z: narrow_odd(fma_to_odd(up(x), up(y), up(z)), kind)  # noqa: E731
        return compute(instruction, operands, function, kind, kind, kind, kind)
    if words == ["rn", "f32"] and kind in ("f16", "bf16"):
        up = widen_bfloat16 if kind == "bf16" else (lambda x: x)
        function = lambda x, y, z: canonical(fma(up(x), up(y), z), "f32")  # noqa: E731
        return compute(instruction, operands, function, "f32", kind, kind, "f32")
    raise unknown(instruction)


_APPROXIMATE: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
}


@entry(*_APPROXIMATE)
def _approximate(instruction: Instruction, operands: Operands) -> Run:
    """The exact value rounded; .ftz flushes argument and result."""
    words = modifiers(instruction, "approx", "ftz", "rn", "f32")
    if not {"approx", "rn"} & words or ("rn" in words and instruction.opcode[0] not in ("rcp", "sqrt")):
        raise unknown(instruction)
    function, flushed = _APPROXIMATE[instruction.opcode[0]], "ftz" in words

    def evaluate(x: np.ndarray) -> np.ndarray:
        y = function((flush(x) if flushed else x).astype(np.float64)).astype(np.float32)
        return canonical(flush(y) if flushed else y, "f32")

    return compute(instruction, operands, evaluate, "f32", "f32")


def divide(instruction: Instruction, operands: Operands) -> Run:
    """div of floats; integers go to `integer_arithmetic`."""
    if instruction.opcode[-1] != "f32":
        return integer_arithmetic(instruction, operands)
    words = modifiers(instruction, "full", "approx", "rn", "f32")
    if len(words) != 2:
        raise unknown(instruction)

    def quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if "approx" in words:  # x * (1 / y): the reciprocal of a number above 2^126 is flushed to zero
            size = np.abs(y)
            y = np.where((size > 2.0**126) & np.isfinite(y), np.copysign(np.float32(np.inf), y), y)
        return canonical((x.astype(np.float64) / y).astype(np.float32), "f32")

    return compute(instruction, operands, quotient, "f32", "f32", "f32")


entry("div")(divide)
