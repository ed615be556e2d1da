"""Instructions that pass values between the lanes of a warp (PTX ISA 9.7.9.6, 9.7.13)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx_check.bits import TYPES, WARP, canonical
from ptx_check.decode import Instruction
from ptx_check.errors import Misuse
from ptx_check.operands import Operands, Source
from ptx_check.ops_float import maximum, minimum
from ptx_check.table import Run, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block

LANE = np.arange(WARP)


def warps_of(block: "Block", active: np.ndarray | None, members: Source | None = None) -> np.ndarray:
    """[warps, 32] of the active lanes; every member of the mask must be among them."""
    lanes = np.ones((block.warps, WARP), bool) if active is None else active.reshape(-1, WARP)
    if members is not None:
        mask = members.get(block).reshape(-1, WARP)
        named = (mask[:, :, None] >> LANE.astype(np.uint32)) & 1 == 1  # [warps, lanes, named lanes]
        missing = lanes[:, :, None] & named & ~lanes[:, None, :]
        if missing.any():
            raise Misuse("the member mask names lanes that do not execute the instruction")
        if (lanes & ~named[:, LANE, LANE]).any():
            raise Misuse("a lane executes the instruction and is not in its member mask")
    return lanes


@entry("shfl")
def _shuffle(instruction: Instruction, operands: Operands) -> Run:
    words = modifiers(instruction, "sync", "up", "down", "bfly", "idx", "b32")
    mode = words - {"sync", "b32"}
    if len(mode) != 1 or "|" in instruction.operands[0]:
        raise unknown(instruction)
    (mode,) = mode
    target = operands.write(instruction.operands[0], "b32")
    value, by, control, members = (operands.read(text, "u32") for text in instruction.operands[1:5])

    def run(block: "Block", active: np.ndarray | None) -> None:
        lanes = warps_of(block, active, members)
        b = (by.get(block) & 31).reshape(-1, WARP).astype(np.int64)
        c = control.get(block).reshape(-1, WARP).astype(np.int64)
        clamp, segment = c & 31, (c >> 8) & 31
        top, bottom = (LANE & segment) | (clamp & ~segment), LANE & segment
        source = {
            "up": LANE - b,
            "down": LANE + b,
            "bfly": LANE ^ b,
            "idx": bottom | (b & ~segment),
        }[mode]
        inside = source >= top if mode == "up" else source <= top
        source = np.where(inside, source, LANE)
        if (lanes & ~np.take_along_axis(lanes, source, 1)).any():
            raise Misuse("a shuffle reads from a lane that does not execute it")
        moved = np.take_along_axis(value.get(block).reshape(-1, WARP), source, 1).reshape(-1)
        bad = block.undefined_in(value.slots, active)
        target.put(block, moved, active)
        if bad is not None:
            bad = np.take_along_axis(bad.reshape(-1, WARP), source, 1).reshape(-1) & lanes.reshape(-1)
            for slot in target.slots:
                block.mark_undefined(slot, bad)

    return run


_REDUCE: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@entry("redux")
def _reduce(instruction: Instruction, operands: Operands) -> Run:
    """All lanes get the same; floats (sm_100) skip NaN unless .NaN is given."""
    kind = instruction.opcode[-1]
    words = modifiers(instruction, "sync", kind, *_REDUCE, "NaN")
    name = words & set(_REDUCE)
    logic = name & {"and", "or", "xor"}
    if (
        len(name) != 1
        or kind not in (("b32",) if logic else ("u32", "s32", "f32"))
        or (kind == "f32" and "add" in name)
    ):
        raise unknown(instruction)
    (name,) = name
    function = _REDUCE[name]
    if kind == "f32" and "NaN" not in words:
        function = {"min": minimum, "max": maximum}[name]
    target, value = operands.write(instruction.operands[0], kind), operands.read(instruction.operands[1], kind)
    members = operands.read(instruction.operands[2], "u32")

    def run(block: "Block", active: np.ndarray | None) -> None:
        lanes = warps_of(block, active, members)
        block.require(value.slots, active, "a reduction")
        values = value.get(block).reshape(-1, WARP)
        result = np.zeros((block.warps, WARP), TYPES[kind])
        for warp in np.flatnonzero(lanes.any(1)):
            total = values[warp, lanes[warp]][:1]
            for one in values[warp, lanes[warp]][1:]:
                total = function(total, one)
            result[warp] = total
        result = result.reshape(-1)
        target.put(block, canonical(result, "f32") if kind == "f32" else result, active)

    return run


@entry("elect")
def _elect(instruction: Instruction, operands: Operands) -> Run:
    """The lowest lane of the warp is the leader."""
    modifiers(instruction, "sync")
    leader, elected = instruction.operands[0].split("|")
    leader, elected = operands.write(leader, "u32"), operands.write(elected, "pred")
    members = operands.read(instruction.operands[1], "u32")

    def run(block: "Block", active: np.ndarray | None) -> None:
        lanes = warps_of(block, active, members)
        first = np.argmax(lanes, 1)[:, None]
        leader.put(block, np.broadcast_to(first, lanes.shape).astype(np.uint32).reshape(-1), active)
        elected.put(block, (first == LANE).reshape(-1), active)

    return run


@entry("setmaxnreg")
def _register_count(instruction: Instruction, operands: Operands) -> Run:
    """9.7.19.5: how many registers a thread has from now on. Here each has all that it names, and nobody waits."""
    words = modifiers(instruction, "inc", "dec", "sync", "aligned", "u32")
    number = int(instruction.operands[0], 0)
    if len(words) != 4 or not 24 <= number <= 256 or number % 8:
        raise unknown(instruction)

    def run(block: "Block", active: np.ndarray | None) -> None:
        lanes = warps_of(block, active)
        if (lanes.any(1) & ~lanes.all(1)).any():
            raise Misuse("some lanes of a warp alone change how many registers it has")

    return run
