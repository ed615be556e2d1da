"""A program instance (a thread block): registers of all its threads, its shared memory, its clocks.

A register is one array over all threads, never changed in place, so reading is free and an old value stays what it
was. ``undefined`` says of which threads a register was never written. That follows a value through the instructions
that move or compute with it, and is an error where something depends on it: an address, a predicate, a store to global
memory, a matrix product. (A masked load leaves registers undefined that a masked store then does not store.) It is kept
for the four quarters of a register apart, because numbers may be packed of which some are never looked at.
"""

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_check.bits import WARP
from ptx_check.clocks import Clocks
from ptx_check.errors import Misuse, Uninitialised
from ptx_check.operands import Operands, Source
from ptx_check.shared_memory import SharedMemory

if TYPE_CHECKING:
    from ptx_check.global_memory import GlobalMemory
    from ptx_check.table import Program


WHOLE = np.uint8(15)  # a bit for each quarter of a register, the lowest first: bytes of 32 bits
LOW, HIGH = np.uint8(3), np.uint8(12)


class Block:
    def __init__(
        self,
        program: "Program",
        index: int,
        position: tuple[int, int, int],
        grid: tuple[int, int, int],
        shared_bytes: int,
        memory: "GlobalMemory",
        parameters: bytes,
        descriptors: dict[int, Any],
        random_source: random.Random | None = None,
    ):
        operands: Operands = program.operands
        self.program, self.index, self.position, self.grid = program, index, position, grid
        self.memory, self.parameters, self.descriptors = memory, parameters, descriptors
        self.random = random_source  # decides what the ISA leaves open; None: always the same way
        self.threads = program.kernel.threads
        self.warps = self.threads // WARP
        self.thread = np.arange(self.threads)
        self.registers = [np.zeros(self.threads, kind) for kind in operands.types]
        never = np.full(self.threads, WHOLE)
        self.undefined: dict[int, np.ndarray] = dict.fromkeys(range(len(operands.types)), never)
        self.locked: dict[int, set[int]] = {}  # register -> warps whose wgmma in flight writes it
        self.shared = SharedMemory(shared_bytes, readers=self.warps if program.warps_part else 1)
        self.clocks = Clocks(self.warps)
        self.pc = 0  # of the instruction that runs now
        self.state: dict[str, Any] = {}  # what kinds of instructions keep for themselves: see `keep`

    def keep(self, make: type) -> Any:
        """The one object of class ``make`` that belongs to this block."""
        if make.__name__ not in self.state:
            self.state[make.__name__] = make()
        return self.state[make.__name__]

    def lanes(self, active: np.ndarray | None) -> np.ndarray:
        """Numbers of the active threads."""
        return self.thread if active is None else np.flatnonzero(active)

    def active_warps(self, active: np.ndarray | None) -> list[int]:
        if active is None:
            return list(range(self.warps))
        return np.flatnonzero(active.reshape(-1, WARP).any(1)).tolist()

    def put(self, slot: int, value: np.ndarray, active: np.ndarray | None) -> None:
        """Write a register of the active threads."""
        if slot in self.locked:
            self.check_unlocked(slot, active)
        if active is None:
            self.registers[slot] = value
            self.undefined.pop(slot, None)
            return
        self.registers[slot] = np.where(active, value, self.registers[slot])
        before = self.undefined.get(slot)
        if before is not None:
            left = before * ~active
            if left.any():
                self.undefined[slot] = left
            else:
                del self.undefined[slot]

    def mark_undefined(self, slot: int, where: np.ndarray) -> None:
        """``where``: threads, or for each thread which quarters of the register."""
        quarters = where * WHOLE if where.dtype == np.bool_ else where
        before = self.undefined.get(slot)
        self.undefined[slot] = quarters if before is None else before | quarters

    def undefined_in(self, slots: tuple[int, ...], active: np.ndarray | None) -> np.ndarray | None:
        """Active threads of which one of the registers is undefined, or None if there are none."""
        bad = None
        for slot in slots:
            if slot in self.locked:
                self.check_unlocked(slot, active)
            one = self.undefined.get(slot)
            if one is not None:
                bad = one if bad is None else bad | one
        if bad is None:
            return None
        bad = bad != 0 if active is None else (bad != 0) & active
        return bad if bad.any() else None

    def taint(self, sources: Sequence[Source], active: np.ndarray | None, by_halves: bool) -> np.ndarray | None:
        """Which quarters of a result are undefined, for each thread, or None: those that come from undefined ones."""
        total = None
        for source in sources:
            if source.parts is None or not by_halves:
                low = high = source.slots
            else:
                low, high = source.parts
            bad = np.zeros(self.threads, np.uint8)
            for bit, slots in ((LOW, low), (HIGH, high)):
                for slot in slots:
                    one = self.undefined.get(slot)
                    if one is not None:
                        # A part of a vector fills its half; of a whole register the halves stay what they are.
                        bad |= one & bit if source.parts is None and by_halves else (one != 0) * bit
            total = bad if total is None else total | bad
        if total is None:
            return None
        total = total if active is None else total * active
        return total if total.any() else None

    def require(self, sources: tuple[int, ...], active: np.ndarray | None, what: str) -> None:
        """What an instruction depends on must be defined."""
        bad = self.undefined_in(sources, active)
        if bad is not None:
            names = {slot: name for name, slot in self.program.operands.slots.items()}
            which = [names[s] for s in sources if s in self.undefined and self.undefined[s][bad].any()]
            raise Uninitialised(
                f"{what} depends on {', '.join(which)}, never written by thread {np.flatnonzero(bad)[0]}"
            )

    def value(self, source: Source, active: np.ndarray | None, what: str) -> np.ndarray:
        """The value of a source that must be defined."""
        self.require(source.slots, active, what)
        return source.get(self)

    def check_unlocked(self, slot: int, active: np.ndarray | None) -> None:
        if self.locked[slot].intersection(self.active_warps(active)):
            raise Misuse("a register is used while a wgmma in flight is going to write it: wgmma.wait_group is missing")

    def describe(self, pc: int) -> str:
        """An instruction with its line in the kernel's source."""
        if pc >= len(self.program.kernel.instructions):
            return "the end of the kernel"
        instruction = self.program.kernel.instructions[pc]
        text = instruction.text if len(instruction.text) < 120 else instruction.text[:117] + "..."
        return f"`{text}`" + (f" ({instruction.source})" if instruction.source else "")

    def race(self, verb: str, done: str, stamp: int, byte: int, memory: str = "shared memory") -> str:
        """Two accesses of a race, in words."""
        from ptx_check import shadow

        agent = int(shadow.agent_of(stamp))
        who = f"warp {agent}" if agent < self.warps else "several warps" if agent == shadow.MANY else "a copy"
        lane = int(shadow.lane_of(stamp))
        who += f" lane {lane}" if agent < self.warps and lane < WARP else ""
        return (
            f"{verb} byte {int(byte)} of {memory}, which {who} has {done} by "
            f"{self.describe(int(shadow.pc_of(stamp)))}; no barrier lies between"
        )
