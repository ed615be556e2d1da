"""Breaks a kernel on purpose, one instruction at a time: does what checks it notice?

Each barrier, wait, fence and bound is left out in turn. Where that is not noticed, the run is too small to need the
instruction, or the kernel has more of them than it needs.
"""

import re
from collections.abc import Callable, Iterator, MutableMapping
from dataclasses import dataclass, replace

from ptx_check.decode import Instruction, decode
from ptx_check.errors import PtxError
from ptx_check.table import Program

DROPPED = {
    "barrier": r"bar\.(warp\.)?sync|barrier\.sync",
    "wait for copies": r"cp\.async\.wait_group",
    "wait for products": r"wgmma\.wait_group|tcgen05\.wait::st",
    "fence": r"fence\.proxy\.async|wgmma\.fence",
    "mbarrier": r"mbarrier\.(init|arrive)",
}


@dataclass(frozen=True)
class Mutant:
    """A kernel with one instruction less.

    Attributes:
        kind: "barrier", "wait for copies", "wait for products", "fence", "mbarrier", "wait for an mbarrier", "bound".
        at: number of the instruction.
        instruction: what was there; its ``source`` is the line of the kernel, where PTX has it.
        noticed: "error", by a check; "wrong", by the result; "redundant", only once others of which none is missed
            alone are gone, too; "" where nothing notices it.
        message: what was said.
    """

    kind: str
    at: int
    instruction: Instruction
    noticed: str
    message: str


def mutants(ptx: str) -> Iterator[tuple[str, int, Instruction | None]]:
    """(kind, index, replacement or None to drop) of each mutant of a kernel."""
    instructions = decode(ptx).instructions
    constant = {i.operands[0] for i in instructions if i.opcode == ("mov", "pred")}  # such a predicate is no bound
    for at, instruction in enumerate(instructions):
        opcode = ".".join(instruction.opcode)
        for kind, pattern in DROPPED.items():
            if re.match(pattern, opcode):
                yield kind, at, None
        if opcode.startswith("mbarrier.try_wait"):
            always = replace(instruction, opcode=("setp", "eq", "s32"), operands=(instruction.operands[0], "0", "0"))
            yield "wait for an mbarrier", at, always
        bounded = instruction.predicate and instruction.predicate not in constant
        if bounded and re.match(r"(ld|st)\.global|cp\.async\.c[ag]|atom|red\.", opcode):
            yield "bound", at, replace(instruction, predicate=None, negated=False)


def mutate(
    ptx: str,
    run: Callable[[Program], None],
    known: MutableMapping[str, tuple[str, str]] | None = None,
    tell: Callable[[int, int], None] = lambda done, of: None,
) -> Iterator[Mutant]:
    """Break a kernel, one instruction after the other, and run what is left.

    Args:
        ptx: with one kernel.
        run: runs a program with fresh arguments, as `check` does, and raises AssertionError where results are wrong.
        known: by the numbers of the instructions that are gone, "12" or "12 40", (noticed, message) of earlier runs,
            which are not run again; each new one is put there at once.
        tell: is called with the runs that are behind and those that there are, before each.

    Yields:
        A mutant for each instruction that makes a difference (not one that ``run`` never comes to, nor a bound that is
        always met) as soon as it is known how it is noticed: those that are noticed alone come first.

    Raises:
        PtxError, AssertionError: from ``run`` with the kernel as it is.
    """
    whole = Program(ptx)
    run(whole)
    # Broken or not, runs are the same if they never come there, or if a bound is always met.
    reached = [
        acted if instruction.predicate else executed
        for instruction, acted, executed in zip(whole.kernel.instructions, whole.acted, whole.executed, strict=False)
    ]
    found = [m for m in mutants(ptx) if reached[m[1]] and (m[0] != "bound" or whole.masked[m[1]])]
    outcomes = {} if known is None else known

    def outcome(changes: dict[int, Instruction | None]) -> tuple[str, str]:
        key = " ".join(map(str, sorted(changes)))
        if key not in outcomes:
            outcomes[key] = _outcome(Program(ptx, changes), run)
        return outcomes[key]

    alone = []
    for number, (kind, at, instruction) in enumerate(found):
        tell(number, len(found))
        noticed, message = outcome({at: instruction})
        if noticed or kind == "bound":
            yield Mutant(kind, at, whole.kernel.instructions[at], noticed, message)
        else:
            alone.append((kind, at, instruction))
    # The compiler puts one barrier beside another, so that none of them is missed alone. Take away one after the other
    # as long as nobody notices: what is noticed then did the same as some that are gone.
    gone: dict[int, Instruction | None] = {}
    for number, (kind, at, instruction) in enumerate(alone, len(found)):
        tell(number, len(found) + len(alone))
        noticed, message = outcome({**gone, at: instruction})
        if noticed:
            noticed, message = "redundant", f"without {sorted(gone)}: {message}"
        else:
            gone[at] = instruction
        yield Mutant(kind, at, whole.kernel.instructions[at], noticed, message)


def _outcome(program: Program, run: Callable[[Program], None]) -> tuple[str, str]:
    """How a broken program is noticed, and what is said; nothing when all is right."""
    try:
        run(program)
    except PtxError as error:
        return "error", f"{type(error).__name__}: {error}"
    except AssertionError as error:
        return "wrong", str(error)
    return "", ""
