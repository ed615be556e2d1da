"""Integer and logic instructions (PTX ISA 9.7.1, 9.7.6, 9.7.8), comparison and selection."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx_check.bits import FLOATS, TYPES, widen_bfloat16
from ptx_check.decode import Instruction
from ptx_check.operands import Operands
from ptx_check.table import Run, compute, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block

INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")
BITS = ("b16", "b32", "b64", "pred")
ONE_OPERAND = ("neg", "abs", "not")
WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
# The operands of shifts and bit fields are clamped or reduced; what they do is said at each.
_LOGIC: dict[str, Callable[..., np.ndarray]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}


def integer_arithmetic(instruction: Instruction, operands: Operands) -> Run:
    """add, sub, neg, abs, min, max, div, rem, mul, mad: wrapping, as the type says."""
    name, kind = instruction.opcode[0], instruction.opcode[-1]
    if kind not in INTEGERS:
        raise unknown(instruction)
    dtype = TYPES[kind]
    words = modifiers(instruction, kind, *(("lo", "hi", "wide") if name in ("mul", "mad") else ("relu",)))
    if name in ("mul", "mad"):
        return _multiplication(instruction, operands, words - {kind})
    plain: dict[str, Callable[..., np.ndarray]] = {
        "add": np.add,
        "sub": np.subtract,
        "neg": lambda x: dtype.type(0) - x,
        "abs": np.abs,
        "min": np.minimum,
        "max": np.maximum,
        "div": _divide,
        "rem": lambda x, y: x - _divide(x, y) * y,
    }
    function = plain[name]
    if "relu" in words:
        if (name, kind) not in (("max", "s32"), ("min", "s32")):
            raise unknown(instruction)
        return compute(instruction, operands, lambda x, y: np.maximum(function(x, y), 0), kind, kind, kind)
    return compute(instruction, operands, function, kind, *([kind] * (1 if name in ONE_OPERAND else 2)))


def _divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Towards zero; by zero all ones, which is what the hardware gives and the ISA leaves open."""
    safe = np.where(y == 0, 1, y).astype(x.dtype)
    if x.dtype.kind == "u":
        return np.where(y == 0, x.dtype.type(np.iinfo(x.dtype).max), x // safe)
    quotient = x // safe
    towards_zero = quotient + ((quotient < 0) & (quotient * safe != x))
    return np.where(y == 0, x.dtype.type(-1), towards_zero).astype(x.dtype)


def _multiplication(instruction: Instruction, operands: Operands, words: set[str]) -> Run:
    kind, adds = instruction.opcode[-1], instruction.opcode[0] == "mad"
    if words == {"lo"}:
        function = (lambda x, y, z: x * y + z) if adds else np.multiply
        return compute(instruction, operands, function, kind, *([kind] * (3 if adds else 2)))
    if words == {"wide"} and kind in WIDE:
        wide = TYPES[WIDE[kind]]
        if adds:
            function = lambda x, y, z: x.astype(wide) * y.astype(wide) + z  # noqa: E731
            return compute(instruction, operands, function, WIDE[kind], kind, kind, WIDE[kind])
        return compute(instruction, operands, lambda x, y: x.astype(wide) * y.astype(wide), WIDE[kind], kind, kind)
    if words == {"hi"} and kind in WIDE and not adds:
        wide, shift = TYPES[WIDE[kind]], TYPES[WIDE[kind]].type(8 * TYPES[kind].itemsize)
        return compute(
            instruction,
            operands,
            lambda x, y: ((x.astype(wide) * y.astype(wide)) >> shift).astype(TYPES[kind]),
            kind,
            kind,
            kind,
        )
    raise unknown(instruction)


entry("rem")(integer_arithmetic)


@entry("mad")
def _mad(instruction: Instruction, operands: Operands) -> Run:
    return integer_arithmetic(instruction, operands)


@entry("and", "or", "xor", "not")
def _logic(instruction: Instruction, operands: Operands) -> Run:
    kind = instruction.opcode[-1]
    modifiers(instruction, kind)
    if kind not in BITS:
        raise unknown(instruction)
    count = 1 if instruction.opcode[0] in ONE_OPERAND else 2
    return compute(instruction, operands, _LOGIC[instruction.opcode[0]], kind, *([kind] * count), by_bits=True)


@entry("shl", "shr")
def _shift(instruction: Instruction, operands: Operands) -> Run:
    """By more than the width: zeros, or copies of the sign."""
    name, kind = instruction.opcode[0], instruction.opcode[-1]
    modifiers(instruction, kind)
    dtype = TYPES[kind]
    bits = 8 * dtype.itemsize

    def shift(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        some = np.minimum(by, bits - 1).astype(dtype)
        if name == "shr":
            return np.where(by >= bits, x >> dtype.type(bits - 1) if dtype.kind == "i" else dtype.type(0), x >> some)
        return np.where(by >= bits, dtype.type(0), x << some)

    return compute(instruction, operands, shift, kind, kind, "u32")


@entry("popc")
def _count_bits(instruction: Instruction, operands: Operands) -> Run:
    kind = instruction.opcode[-1]
    modifiers(instruction, kind)
    if kind not in ("b32", "b64"):
        raise unknown(instruction)

    def count(x: np.ndarray) -> np.ndarray:
        return np.unpackbits(np.ascontiguousarray(x).view(np.uint8).reshape(x.size, -1), axis=1).sum(1, dtype=np.uint32)

    return compute(instruction, operands, count, "u32", kind)


@entry("bfe")
def _bit_field(instruction: Instruction, operands: Operands) -> Run:
    """Position and length are their low 8 bits; past the top stand zeros, or the sign (bit of the field's end)."""
    kind = instruction.opcode[-1]
    modifiers(instruction, kind)
    dtype = TYPES[kind]
    bits = 8 * dtype.itemsize
    if bits != 32:
        raise unknown(instruction)

    def extract(x: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        position, length = (position & 255).astype(np.int64), (length & 255).astype(np.int64)
        wide = x.astype(np.int64) if dtype.kind == "i" else x.view(np.uint32).astype(np.int64)
        field = np.where(position >= bits, -(wide < 0).astype(np.int64), wide >> np.minimum(position, 63))
        kept = np.minimum(length, 63)
        mask = (np.int64(1) << kept) - 1
        if dtype.kind == "u":
            return (field & mask).astype(dtype)
        # The sign is the field's top bit, or the number's own where the field ends beyond it.
        top = np.minimum(position + length - 1, bits - 1)
        sign = (wide >> top) & 1
        inside = np.minimum(length, np.maximum(bits - position, 0))
        low = field & ((np.int64(1) << np.minimum(inside, 63)) - 1)
        extended = low | np.where(sign == 1, ~((np.int64(1) << np.minimum(inside, 62)) - 1), 0)
        return np.where(length == 0, 0, extended).astype(dtype)

    return compute(instruction, operands, extract, kind, kind, "u32", "u32")


@entry("prmt")
def _permute(instruction: Instruction, operands: Operands) -> Run:
    """Four bytes picked out of eight; with the high bit of a selector, its sign eight times."""
    modifiers(instruction, "b32")

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = np.stack([a, b], 1).view(np.uint8)  # [threads, 8]
        picks = (selector[:, None] >> (4 * np.arange(4, dtype=np.uint32))) & 15
        chosen = np.take_along_axis(both, (picks & 7).astype(np.int64), 1)
        signs = np.where(chosen & 128, 255, 0)
        return np.ascontiguousarray(np.where(picks & 8, signs, chosen).astype(np.uint8)).view(np.uint32).reshape(-1)

    whole = compute(instruction, operands, permute, "b32", "u32", "u32", "u32")
    if operands.is_register(instruction.operands[3]):
        return whole
    # Undefined is only what comes from undefined bytes: small numbers are packed this way.
    target, sources = operands.write(instruction.operands[0], "b32"), instruction.operands[1:3]
    slots = [operands.slot(text) if operands.is_register(text) else None for text in sources]
    selector = int(instruction.operands[3].removesuffix("U"), 0)
    picks = [(slots[pick >> 2], pick & 3) for pick in ((selector >> 4 * i) & 7 for i in range(4))]

    def run(block: "Block", active: np.ndarray | None) -> None:
        bad = np.zeros(block.threads, np.uint8)
        for byte, (slot, quarter) in enumerate(picks):
            if slot in block.undefined:
                bad |= ((block.undefined[slot] >> quarter) & 1) << byte
        whole(block, active)
        for slot in target.slots:
            kept = block.undefined.pop(slot, None)
            if kept is not None and active is not None:
                bad = np.where(active, bad, kept)
            if bad.any():
                block.mark_undefined(slot, bad.astype(np.uint8))

    return run


_COMPARE: dict[str, Callable[..., np.ndarray]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@entry("setp")
def _set_predicate(instruction: Instruction, operands: Operands) -> Run:
    """With a NaN, ordered comparisons are false and those with a ``u`` (equ, ltu ...) true."""
    name, *combine, kind = instruction.opcode[1:]
    floating = kind in FLOATS
    if (combine and (len(combine) > 1 or combine[0] not in ("and", "or", "xor"))) or "|" in instruction.operands[0]:
        raise unknown(instruction)

    def compare(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if kind == "bf16":
            x, y = widen_bfloat16(x), widen_bfloat16(y)
        if not floating:
            return _COMPARE[_UNSIGNED.get(name, name)](x, y)
        nan = np.isnan(x) | np.isnan(y)
        if name in ("nan", "num"):
            return nan if name == "nan" else ~nan
        if name.endswith("u"):
            return _COMPARE[name[:-1]](x, y) | nan
        return _COMPARE[name](x, y) & ~nan

    known = {*_COMPARE, *(["nan", "num", *(n + "u" for n in _COMPARE)] if floating else _UNSIGNED)}
    if name not in known:
        raise unknown(instruction)
    if combine:
        join = _LOGIC[combine[0]]
        return compute(instruction, operands, lambda x, y, z: join(compare(x, y), z), "pred", kind, kind, "pred")
    return compute(instruction, operands, compare, "pred", kind, kind)


@entry("selp")
def _select(instruction: Instruction, operands: Operands) -> Run:
    """Undefined is only what was selected, so this is not `compute`."""
    kind = instruction.opcode[-1]
    modifiers(instruction, kind)
    target = operands.write(instruction.operands[0], kind)
    x, y = (operands.read(text, kind) for text in instruction.operands[1:3])
    condition = operands.read(instruction.operands[3], "pred")

    def run(block, active):
        chosen = condition.get(block)
        bad = None
        if block.undefined:
            for source, where in ((condition, None), (x, chosen), (y, ~chosen)):
                one = block.undefined_in(source.slots, active)
                if one is not None:
                    one = one if where is None else one & where
                    bad = one if bad is None else bad | one
        target.put(block, np.where(chosen, x.get(block), y.get(block)), active)
        if bad is not None and bad.any():
            for slot in target.slots:
                block.mark_undefined(slot, bad)

    return run


@entry("mov")
def _move(instruction: Instruction, operands: Operands) -> Run:
    kind = instruction.opcode[-1]
    modifiers(instruction, kind)
    return compute(instruction, operands, lambda x: x, kind, kind, by_bits=True)
