"""Asynchronous copies of single threads from global to shared memory (PTX ISA 9.7.9.25.3: cp.async).

Nothing arrives before its thread waits for it; until then the bytes may be neither read nor written.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx_check.bits import WARP
from ptx_check.decode import Instruction
from ptx_check.errors import Misuse
from ptx_check.operands import Operands
from ptx_check.ops_tma import load_tensor
from ptx_check.table import Run, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block


class Copy(NamedTuple):
    """What some lanes of a warp copy: [lanes, size] bytes, to ``index``."""

    index: np.ndarray
    data: np.ndarray
    lanes: np.ndarray


class CopyQueues:
    """Of each warp: copies since the last commit, and the committed groups, oldest first."""

    def __init__(self) -> None:
        self.open: dict[int, list[Copy]] = {}
        self.groups: dict[int, list[list[Copy]]] = {}

    def commit(self, warp: int) -> None:
        self.groups.setdefault(warp, []).append(self.open.pop(warp, []))

    def wait(self, block: "Block", warp: int, pending: int) -> None:
        """Let all but the youngest ``pending`` groups arrive."""
        groups = self.groups.get(warp, [])
        while len(groups) > pending:
            for copy in groups.pop(0):
                block.shared.in_flight[copy.index] = False
                block.shared.check_write(block, copy.index, copy.lanes, copy.data)
                block.shared.write(block, copy.index, copy.data, copy.lanes)


@entry("cp")
def _copy(instruction: Instruction, operands: Operands) -> Run:
    """cp.async and its commits and waits; the bulk kind is in `ops_tma`."""
    if instruction.opcode[1:3] == ("async", "bulk"):
        return load_tensor(instruction, operands)
    words = instruction.opcode[1:]
    if words == ("async", "commit_group"):
        return for_each_warp(lambda block, warp: block.keep(CopyQueues).commit(warp))
    if words == ("async", "wait_group"):
        pending = int(instruction.operands[0], 0)
        return for_each_warp(lambda block, warp: block.keep(CopyQueues).wait(block, warp, pending))
    modifiers(instruction, "async", "ca", "cg", "shared", "global")
    target, source = (operands.address(text) for text in instruction.operands[:2])
    size = int(instruction.operands[2], 0)
    if size not in (4, 8, 16) or len(instruction.operands) > 4:
        raise unknown(instruction)
    # Bytes that are read; the rest of the copy is zeros.
    given = operands.read(instruction.operands[3], "u32") if len(instruction.operands) == 4 else None

    def run(block: "Block", active: np.ndarray | None) -> None:
        lanes = block.lanes(active)
        where = block.value(target, active, "an address")[lanes]
        start = block.value(source, active, "an address")[lanes]
        count = np.full(len(lanes), size) if given is None else block.value(given, active, "a size")[lanes]
        data = np.zeros((len(lanes), size), np.uint8)
        for n in np.unique(count):
            if n not in (0, size):
                raise Misuse("a copy of a part of its bytes is not known here")
            if n:
                some = count == n
                data[some] = block.memory.load(block, start[some], size, lanes[some])
        index = block.shared.index(where, size)
        block.shared.check_write(block, index, lanes)
        block.shared.in_flight[index] = True
        queues = block.keep(CopyQueues)
        for warp in np.unique(lanes // WARP).tolist():
            mine = lanes // WARP == warp
            queues.open.setdefault(warp, []).append(Copy(index[mine], data[mine], lanes[mine]))

    return run


def for_each_warp(act: Callable[["Block", int], None]) -> Run:
    """An instruction that a warp executes as one."""

    def run(block: "Block", active: np.ndarray | None) -> None:
        for warp in block.active_warps(active):
            act(block, warp)

    return run
