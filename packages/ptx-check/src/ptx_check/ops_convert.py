"""Conversions (PTX ISA 9.7.9.20 cvta, 9.7.9.21 cvt)."""

import numpy as np

from ptx_check.bits import FLOATS, TYPES, canonical, narrow, widen_bfloat16
from ptx_check.decode import Instruction
from ptx_check.operands import Operands
from ptx_check.table import Run, compute, entry, modifiers, unknown


@entry("cvta")
def _convert_address(instruction: Instruction, operands: Operands) -> Run:
    """Generic addresses are the addresses themselves; a parameter's is its offset."""
    modifiers(instruction, "param", "global", "u64")
    return compute(instruction, operands, lambda x: x, "u64", "u64")


@entry("cvt")
def _convert(instruction: Instruction, operands: Operands) -> Run:
    """Between integers: truncate or extend. Floats: to nearest even, or to an integer by .rzi, .rni, .rmi, .rpi."""
    *words, result, kind = instruction.opcode[1:]
    if result in ("f16x2", "bf16x2"):
        if words != ["rn"] or kind != "f32":
            raise unknown(instruction)

        def pack(high: np.ndarray, low: np.ndarray) -> np.ndarray:
            return np.stack([narrow(low, result), narrow(high, result)], 1).view(np.uint32).reshape(-1)

        return compute(instruction, operands, pack, result, "f32", "f32")
    from_float, to_float = kind in FLOATS, result in FLOATS
    if not from_float and not to_float:
        if words:
            raise unknown(instruction)
        return compute(instruction, operands, lambda x: x.astype(TYPES[result]), result, kind)
    if from_float and to_float:
        return _float_to_float(instruction, operands, words, result, kind)
    if to_float:
        if words != ["rn"] or result != "f32":
            raise unknown(instruction)
        return compute(instruction, operands, lambda x: x.astype(np.float32), result, kind)
    return _float_to_integer(instruction, operands, words, result, kind)


def _float_to_float(instruction: Instruction, operands: Operands, words: list[str], result: str, kind: str) -> Run:
    widens = TYPES[result].itemsize > TYPES[kind].itemsize
    if words != ([] if widens else ["rn"]) or "f64" in (result, kind):
        raise unknown(instruction)

    def convert(x: np.ndarray) -> np.ndarray:
        x = widen_bfloat16(x) if kind == "bf16" else x
        return canonical(x.astype(np.float32), "f32") if widens else narrow(x, result)

    return compute(instruction, operands, convert, result, kind)


def _float_to_integer(instruction: Instruction, operands: Operands, words: list[str], result: str, kind: str) -> Run:
    """Clamped to the integer's range; NaN becomes 0."""
    rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
    if len(words) != 1 or words[0] not in rounding or kind != "f32" or TYPES[result].itemsize != 4:
        raise unknown(instruction)
    limits = np.iinfo(TYPES[result])

    def convert(x: np.ndarray) -> np.ndarray:
        whole = rounding[words[0]](np.nan_to_num(x.astype(np.float64), posinf=1e300, neginf=-1e300))
        return np.clip(whole, limits.min, limits.max).astype(TYPES[result])

    return compute(instruction, operands, convert, result, kind)
