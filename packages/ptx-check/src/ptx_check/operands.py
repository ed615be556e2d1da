"""Operands of instructions: how to read one as a type, and how to write one.

A register is a slot of the block's list, one array over all threads. A source knows the slots it reads, so that
"undefined" can follow a value through the instructions that move it (see `block`).
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx_check.bits import RAW, TYPES, raw
from ptx_check.decode import Kernel, split_operands
from ptx_check.errors import PtxError

if TYPE_CHECKING:
    from ptx_check.block import Block

_INTEGER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|\d+)U?$")
_ADDRESS = re.compile(r"\[\s*([%\w.$#]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
_SPECIAL: dict[str, Callable[["Block"], np.ndarray | int]] = {
    "%tid.x": lambda block: block.thread,
    "%tid.y": lambda block: 0,
    "%tid.z": lambda block: 0,
    "%laneid": lambda block: block.thread % 32,
    "%ntid.x": lambda block: block.threads,
    "%ctaid.x": lambda block: block.position[0],
    "%ctaid.y": lambda block: block.position[1],
    "%ctaid.z": lambda block: block.position[2],
    "%nctaid.x": lambda block: block.grid[0],
    "%nctaid.y": lambda block: block.grid[1],
    "%nctaid.z": lambda block: block.grid[2],
}


@dataclass(frozen=True)
class Source:
    """``get(block)`` is the value of every thread; ``slots`` are the registers it comes from, for a vector with those
    of its low and its high half as ``parts``."""

    get: Callable[["Block"], np.ndarray]
    slots: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Target:
    """``put(block, value, active)`` writes the value of the active threads; ``slots`` are the registers written."""

    put: Callable[["Block", np.ndarray, np.ndarray | None], None]
    slots: tuple[int, ...] = ()
    parts: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def mark_undefined(self, block: "Block", quarters: np.ndarray) -> None:
        """``quarters``: which quarters of the value written are undefined, for each thread."""
        if self.parts is None:
            for slot in self.slots:
                block.mark_undefined(slot, quarters)
            return
        for half, slots in ((3, self.parts[0]), (12, self.parts[1])):
            if (quarters & half).any():
                for slot in slots:
                    block.mark_undefined(slot, quarters & half != 0)


def _halves(slots: list[tuple[int, ...]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Registers of the low and of the high half of a vector's elements."""
    middle = len(slots) // 2
    return sum(slots[:middle], ()), sum(slots[middle:], ())


class Operands:
    """The registers of one kernel, and readers and writers for operands of its instructions."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.slots: dict[str, int] = {}
        self.types: list[np.dtype] = []
        self._declared = {}
        for name, kind in kernel.registers.items():
            prefix = re.match(r"(.*)<\d+>$", name)
            self._declared[prefix[1] if prefix else name] = TYPES[kind]

    def slot(self, name: str) -> int:
        if name not in self.slots:
            kind = self._declared.get(name) or self._declared.get(re.sub(r"\d+$", "", name))
            if kind is None:
                raise PtxError(f"the register {name} is not declared")
            self.slots[name] = len(self.types)
            self.types.append(np.dtype("?") if kind == np.bool_ else RAW[kind.itemsize])
        return self.slots[name]

    def is_register(self, text: str) -> bool:
        return text in self._declared or re.sub(r"\d+$", "", text) in self._declared

    def read(self, text: str, kind: str) -> Source:
        """``text`` read as PTX type ``kind``; a wider register gives its low bits."""
        dtype = TYPES[kind]
        if text.startswith("!"):
            source = self.read(text[1:], kind)
            return Source(lambda block: ~source.get(block), source.slots)
        if text.startswith("{"):
            return self._read_vector(split_operands(text[1:-1]), dtype)
        if self.is_register(text):
            return self._read_register(self.slot(text), dtype)
        if text in _SPECIAL:
            special = _SPECIAL[text]
            return Source(lambda block: np.broadcast_to(np.asarray(special(block), dtype), block.threads))
        return self._constant(text, dtype)

    def vector(self, text: str, kind: str) -> list[Source]:
        """The elements of ``{a, b}``, or of a lone operand."""
        names = split_operands(text[1:-1]) if text.startswith("{") else [text]
        return [self.read(name, kind) for name in names]

    def write(self, text: str, kind: str) -> Target:
        """``text`` written from values of PTX type ``kind``; a wider register is filled by sign or zeros."""
        if text == "_":
            return Target(lambda block, value, active: None)
        if text.startswith("{"):
            return self._write_vector(split_operands(text[1:-1]), TYPES[kind])
        slot = self.slot(text)
        register = self.types[slot]
        if register == np.bool_ or TYPES[kind].itemsize == register.itemsize:
            return Target(lambda block, value, active: block.put(slot, raw(value), active), (slot,))
        if TYPES[kind].itemsize > register.itemsize:
            raise PtxError(f"a {kind} does not fit into {text}")
        # astype extends by the sign of the value's own type.
        return Target(lambda block, value, active: block.put(slot, raw(value.astype(register)), active), (slot,))

    def write_vector(self, text: str, kind: str) -> list[Target]:
        names = split_operands(text[1:-1]) if text.startswith("{") else [text]
        return [self.write(name, kind) for name in names]

    def address(self, text: str) -> Source:
        """``[%rd1 + 8]`` as uint64; for a parameter, its offset among the parameters."""
        match = _ADDRESS.match(text)
        if match is None:
            raise PtxError(f"cannot read the address {text}")
        base = self.read(match[1], "u64" if self._is_wide(match[1]) else "u32")
        offset = np.uint64(int(match[2] or "0", 0) % (1 << 64))
        return Source(lambda block: base.get(block).astype(np.uint64) + offset, base.slots)

    def _is_wide(self, name: str) -> bool:
        return self.is_register(name) and self.types[self.slot(name)].itemsize == 8

    def _read_register(self, slot: int, dtype: np.dtype) -> Source:
        register = self.types[slot]
        if register == dtype:
            return Source(lambda block: block.registers[slot], (slot,))
        if register.itemsize == dtype.itemsize:
            return Source(lambda block: block.registers[slot].view(dtype), (slot,))
        if register.itemsize < dtype.itemsize or register == np.bool_:
            raise PtxError("an operand is wider than its register")
        low = RAW[dtype.itemsize]
        return Source(lambda block: block.registers[slot].astype(low).view(dtype), (slot,))

    def _read_vector(self, names: list[str], dtype: np.dtype) -> Source:
        part = RAW[dtype.itemsize // len(names)]
        parts = [self.read(name, f"u{8 * part.itemsize}") for name in names]

        def get(block: "Block") -> np.ndarray:
            return np.stack([p.get(block) for p in parts], 1).view(dtype).reshape(-1)

        slots = [p.slots for p in parts]
        return Source(get, sum(slots, ()), _halves(slots))

    def _write_vector(self, names: list[str], dtype: np.dtype) -> Target:
        part = RAW[dtype.itemsize // len(names)]
        parts = [self.write(name, f"u{8 * part.itemsize}") for name in names]

        def put(block: "Block", value: np.ndarray, active: np.ndarray | None) -> None:
            columns = np.ascontiguousarray(value).view(part).reshape(-1, len(parts))
            for i, target in enumerate(parts):
                target.put(block, np.ascontiguousarray(columns[:, i]), active)

        slots = [p.slots for p in parts]
        return Target(put, sum(slots, ()), _halves(slots))

    def _constant(self, text: str, dtype: np.dtype) -> Source:
        """A number of the instruction: 0f3F800000 and 0d... are bits; an address's name stands for its offset."""
        if text in self.kernel.parameters:
            number = self.kernel.parameters[text][0]
        elif text == "global_smem" or "$" in text:  # shared memory starts at 0; a string's address is never used
            number = 0
        elif re.match(r"0[fF][0-9a-fA-F]{8}$", text) or re.match(r"0[dD][0-9a-fA-F]{16}$", text):
            number = int(text[2:], 16)
        elif _INTEGER.match(text):
            number = int(text.removesuffix("U"), 0)
        else:
            raise PtxError(f"cannot read the operand {text}")
        if dtype == np.bool_:
            value = np.full(self.kernel.threads, number != 0)
        else:
            bits = number % (1 << 8 * dtype.itemsize)
            value = np.full(self.kernel.threads, bits, RAW[dtype.itemsize]).view(dtype)
        return Source(lambda block: value)
