"""The table of instructions: opcode -> a function that makes an instruction runnable.

An entry is a builder: it gets an instruction and the kernel's operands and returns ``run(block, active)``, where
``active`` is a mask over all threads of the block, or None for all. It refuses (`unknown`) what it does not know, with
the instruction's text, so that nothing is skipped silently. Control flow (branches, barriers, exit) belongs to the
scheduler and only has its kind here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx_check.bits import WARP
from ptx_check.decode import Instruction, Kernel, decode
from ptx_check.errors import PtxError, UnknownInstruction
from ptx_check.operands import Operands, Source

if TYPE_CHECKING:
    from ptx_check.block import Block

Run = Callable[["Block", np.ndarray | None], Any]
Builder = Callable[[Instruction, Operands], Run]

TABLE: dict[str, Builder] = {}
# Instructions that all lanes of a warp, which have not exited, execute together.
TOGETHER = {"shfl", "redux", "vote", "ldmatrix", "stmatrix", "mma", "wgmma", "elect", "tcgen05", "setmaxnreg"}
CONTROL = {
    "bra": "branch", "brx": "branch by number", "ret": "exit", "exit": "exit", "bar": "barrier", "barrier": "barrier",
}  # fmt: skip


def entry(*opcodes: str) -> Callable[[Builder], Builder]:
    """Put a builder into the table, for these first words of the opcode."""

    def add(builder: Builder) -> Builder:
        for opcode in opcodes:
            if opcode in TABLE:
                raise ValueError(f"two entries for {opcode}")
            TABLE[opcode] = builder
        return builder

    return add


def unknown(instruction: Instruction) -> UnknownInstruction:
    return UnknownInstruction(f"the table does not know this instruction, or not in this form: {instruction.text}")


def modifiers(instruction: Instruction, *known: str) -> set[str]:
    """What stands after the first word of the opcode; raise if it is not all ``known``."""
    found = set(instruction.opcode[1:])
    if not found <= set(known):
        raise unknown(instruction)
    return found


@dataclass(frozen=True)
class Step:
    """A runnable instruction. ``kind`` is "plain", or what the scheduler does itself."""

    run: Run
    kind: str
    together: bool
    predicate: Source | None = None  # looked at for control flow; other instructions look at theirs themselves
    target: int = -1  # of a branch
    barrier: str = "0"
    count: int = 0  # warps that a barrier counts; 0: all
    number: Source | None = None  # which of the targets a branch by number takes
    targets: tuple[int, ...] = ()


class Program:
    """A kernel made runnable."""

    def __init__(self, ptx: str, replaced: dict[int, Instruction | None] | None = None):
        """``replaced`` puts other instructions, or none, in place of some: to break a kernel on purpose."""
        self.kernel: Kernel = decode(ptx)
        for at, instruction in (replaced or {}).items():
            self.kernel.instructions[at] = instruction or NOTHING
        self.operands = Operands(self.kernel)
        self.steps = [self._step(instruction) for instruction in self.kernel.instructions]
        self.warps_part = any(step.count for step in self.steps)  # some barriers are of some warps alone
        # By instruction: 1 for what some block has run; whose predicate let some thread do it; kept some from it.
        self.executed, self.acted, self.masked = (bytearray(len(self.steps) + 1) for _ in range(3))

    def _step(self, instruction: Instruction) -> Step:
        try:
            return self._build(instruction)
        except UnknownInstruction:
            raise
        except (PtxError, KeyError, ValueError, IndexError, TypeError) as error:
            raise UnknownInstruction(f"{unknown(instruction)} ({type(error).__name__}: {error})") from error

    def _build(self, instruction: Instruction) -> Step:
        opcode, predicate = instruction.opcode[0], None
        if instruction.predicate is not None:
            predicate = self.operands.read("!" * instruction.negated + instruction.predicate, "pred")
        kind = CONTROL.get(opcode, "plain")
        if kind != "plain":
            return self._control(instruction, kind, predicate)
        if opcode not in TABLE:
            raise unknown(instruction)
        run = TABLE[opcode](instruction, self.operands)
        guarded = run if predicate is None else predicated(run, predicate)
        return Step(guarded, kind, opcode in TOGETHER, predicate)

    def _control(self, instruction: Instruction, kind: str, predicate: Source | None) -> Step:
        if kind == "branch":
            modifiers(instruction, "uni")
            return Step(nothing, kind, False, predicate, self.kernel.labels[instruction.operands[0]])
        if kind == "barrier":
            return self._barrier(instruction, predicate)
        if kind == "branch by number":
            if modifiers(instruction, "idx", "uni") == set() or predicate is not None:
                raise unknown(instruction)
            number = self.operands.read(instruction.operands[0], "u32")
            targets = tuple(self.kernel.labels[label] for label in self.kernel.tables[instruction.operands[1]])
            return Step(nothing, kind, False, number=number, targets=targets)
        modifiers(instruction)
        return Step(nothing, kind, False, predicate)

    def _barrier(self, instruction: Instruction, predicate: Source | None) -> Step:
        """``bar.sync number``, for all, or ``bar.sync number, threads``, for so many; ``bar.warp.sync mask``."""
        warp = "warp" in modifiers(instruction, "sync", "warp", "aligned")
        texts = instruction.operands
        count = int(texts[1], 0) if len(texts) > 1 else 0
        if predicate is not None or "sync" not in instruction.opcode or len(texts) > 2 - warp or count % WARP:
            raise unknown(instruction)
        return Step(nothing, "warp barrier" if warp else "barrier", True, barrier=texts[0], count=count // WARP)


def nothing(block: "Block", active: np.ndarray | None) -> None:
    """What a removed instruction does."""


NOTHING = Instruction("(removed)", ("removed",), (), None, False, "")


@entry("removed")
def _removed(instruction: Instruction, operands: Operands) -> Run:
    return nothing


def predicated(run: Run, predicate: Source) -> Run:
    """Run for the active threads whose predicate holds, if there are any."""

    def guarded(block: "Block", active: np.ndarray | None) -> Any:
        holds = block.value(predicate, active, "a predicate")
        holds = holds if active is None else holds & active
        program, pc = block.program, block.pc
        if not (holds.all() if active is None else (holds == active).all()):
            program.masked[pc] = 1
        elif active is None:
            holds = None
        if holds is not None and not holds.any():
            return None
        program.acted[pc] = 1
        return run(block, holds)

    return guarded


def compute(
    instruction: Instruction,
    operands: Operands,
    function: Callable[..., np.ndarray],
    result: str,
    *kinds: str,
    by_halves: bool = False,
    by_bits: bool = False,
) -> Run:
    """An instruction whose first operand is ``function`` of the others, which are of these ``kinds``.

    ``by_halves``: each half of the result depends on the same half of the operands alone; ``by_bits``: each bit.
    """
    if len(instruction.operands) != len(kinds) + 1:
        raise unknown(instruction)
    target = operands.write(instruction.operands[0], result)
    sources = [operands.read(text, kind) for text, kind in zip(instruction.operands[1:], kinds, strict=True)]
    slots = tuple(slot for source in sources for slot in source.slots)
    getters = [source.get for source in sources]
    put = target.put

    def run(block: "Block", active: np.ndarray | None) -> None:
        bad, undefined, locked = None, block.undefined, block.locked
        for slot in slots:
            if slot in locked:
                block.check_unlocked(slot, active)
            if bad is None and slot in undefined:
                bad = block.taint(sources, active, by_halves or by_bits)
                if bad is not None and by_halves:
                    bad = ((bad & 3) != 0) * np.uint8(3) | ((bad & 12) != 0) * np.uint8(12)
        put(block, function(*[get(block) for get in getters]), active)
        if bad is not None:
            target.mark_undefined(block, bad)

    return run
