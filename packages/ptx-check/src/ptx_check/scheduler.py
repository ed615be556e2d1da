"""Who runs next: programs that are resident together, their warps, and the lanes of a warp that took a branch.

Without a seed all warps that stand at the same instruction run it together. With a seed a random group of them runs a
random number of instructions, now of one program, now of another. Lanes of a warp that took different branches run
apart, the ones furthest behind first, until they meet; an instruction for the whole warp waits for them.

A warp whose mbarrier wait failed is left alone while others can run. Copies and matrix products in flight arrive only
when nobody can go on without them: as late as the rules allow.
"""

import random
from collections.abc import Iterator

import numpy as np

from ptx_check.bits import WARP
from ptx_check.block import Block
from ptx_check.errors import Misuse, PtxError, Stuck
from ptx_check.mbarriers import Mbarriers
from ptx_check.table import Step

QUANTA = (1, 4, 32, 256)  # instructions that a group runs before another is chosen
STEPS = 4_000_000  # of one program, before a wait counts as endless


class Warp:
    """Where the lanes of a warp stand: one program counter for each set of lanes that are together."""

    def __init__(self, number: int):
        self.number = number
        self.parts: dict[int, np.ndarray] = {0: np.ones(WARP, bool)}
        self.at_barrier: tuple[str, int] | None = None  # its name, and how many warps it counts

    @property
    def done(self) -> bool:
        return not self.parts

    def move(self, lanes: np.ndarray, pc: int) -> None:
        """Put lanes, which were taken out before, at an instruction."""
        if lanes.any():
            self.parts[pc] = self.parts[pc] | lanes if pc in self.parts else lanes


class BlockRun:
    """One program instance on its way."""

    def __init__(self, block: Block, trace: "Trace | None" = None):
        self.block, self.random, self.trace = block, block.random, trace
        self.warps = [Warp(number) for number in range(block.warps)]
        self.steps = 0

    @property
    def done(self) -> bool:
        return all(warp.done for warp in self.warps)

    def advance(self) -> None:
        """Let some of the warps run for a while."""
        stalled = self.block.keep(Mbarriers).stalled
        live = [w for w in self.warps if not w.done]
        self._let_through(live)
        ready = [w for w in live if w.at_barrier is None]
        awake = [w for w in ready if w.number not in stalled]
        if awake:
            self._run(awake)
        elif ready:
            if not self.block.keep(Mbarriers).arrive_late(self.block, self.random):
                warp = ready[0]
                raise self._located(Stuck("every warp waits for an mbarrier that nobody will complete"), warp)
        else:
            different = len({w.at_barrier for w in live}) > 1
            fault = "warps wait at different barriers" if different else "a barrier waits for warps that have exited"
            raise self._located(Stuck(fault), live[0])

    def _let_through(self, live: list[Warp]) -> None:
        """Those at barriers that as many have reached as they count."""
        waiting: dict[tuple[str, int], list[Warp]] = {}
        for warp in live:
            if warp.at_barrier is not None:
                waiting.setdefault(warp.at_barrier, []).append(warp)
        names = [name for name, _ in waiting]
        for (name, count), group in waiting.items():
            if names.count(name) > 1 or len(group) > count:
                raise self._located(Misuse(f"the warps at barrier {name} do not count alike"), group[0])
            if len(group) == count:
                for warp in group:
                    warp.at_barrier = None
                self.block.clocks.barrier([w.number for w in group])

    def _run(self, awake: list[Warp]) -> None:
        chance = self.random
        leader = awake[0] if chance is None else chance.choice(awake)
        if len(leader.parts) > 1:
            self._run_apart(leader)
            return
        (pc,) = leader.parts
        group = [w for w in awake if len(w.parts) == 1 and pc in w.parts]
        if chance is not None:
            share = chance.choice((0.0, 0.5, 1.0, 1.0))
            group = [w for w in group if w is leader or chance.random() < share]
        quantum = QUANTA[-1] if chance is None else chance.choice(QUANTA)
        active = None
        if len(group) < self.block.warps or not all(w.parts[pc].all() for w in group):
            active = np.zeros((self.block.warps, WARP), bool)
            for warp in group:
                active[warp.number] = warp.parts[pc]
            active = active.reshape(-1)
        for warp in group:
            del warp.parts[pc]
        self._run_group(group, pc, active, quantum)

    def _run_group(self, group: list[Warp], pc: int, active: np.ndarray | None, quantum: int) -> None:
        """Run instructions of warps that stand together, until they part or the quantum is used up."""
        steps, block, stalled = self.block.program.steps, self.block, self.block.keep(Mbarriers).stalled
        executed = block.program.executed
        try:
            for _ in range(quantum):
                step = steps[pc] if pc < len(steps) else _END
                block.pc = pc
                executed[pc] = 1
                self.steps += 1
                if self.trace is not None:
                    self.trace.show(block, step, active)
                if step.kind == "plain":
                    step.run(block, active)
                    pc += 1
                    if stalled and any(w.number in stalled for w in group):
                        break
                    continue
                before = active if active is not None else np.ones(block.threads, bool)
                if step.kind == "branch" and (taken := self._taken(step, active)) is not None:
                    if not taken.any():
                        pc += 1
                        continue
                    if (taken == before).all():
                        pc = step.target
                        continue
                    self._part(group, (before & ~taken, pc + 1), (before & taken, step.target))
                    return
                if step.kind == "branch by number":
                    ways = self._numbered(step, before, active)
                    if len(ways) == 1:
                        pc = ways[0][1]
                        continue
                    self._part(group, *ways)
                    return
                if step.kind == "warp barrier":
                    for warp in group:
                        block.clocks.tick(warp.number)
                    pc += 1
                    continue
                if step.kind == "barrier":
                    for warp in group:
                        warp.at_barrier = (step.barrier, step.count or block.warps)
                    pc += 1
                    break
                taken = self._taken(step, active)  # exit
                self._part(group, (before & ~taken, pc + 1))
                return
            for warp in group:
                lanes = np.ones(WARP, bool) if active is None else active.reshape(-1, WARP)[warp.number]
                warp.move(lanes, pc)
        except PtxError as error:
            raise self._located(error, group[0], active) from None
        if self.steps > STEPS:
            raise self._located(Stuck(f"still running after {STEPS} steps: a wait that never ends?"), group[0])

    def _taken(self, step: Step, active: np.ndarray | None) -> np.ndarray:
        every = np.ones(self.block.threads, bool) if active is None else active
        if step.predicate is None:
            return every
        return self.block.value(step.predicate, active, "a branch") & every

    def _numbered(self, step: Step, before: np.ndarray, active: np.ndarray | None) -> list[tuple[np.ndarray, int]]:
        """The ways of a branch by number that some thread takes."""
        assert step.number is not None
        number = self.block.value(step.number, active, "a branch")
        highest = int(number[before].max())
        if highest >= len(step.targets):
            raise Misuse(f"a branch to target {highest} of a list of {len(step.targets)}")
        ways = [(before & (number == n), target) for n, target in enumerate(step.targets)]
        return [(lanes, target) for lanes, target in ways if lanes.any()]

    def _part(self, group: list[Warp], *ways: tuple[np.ndarray, int]) -> None:
        """Lanes go to instructions of their own; those that no way has exit."""
        for warp in group:
            for lanes, pc in ways:
                warp.move(lanes.reshape(-1, WARP)[warp.number], pc)

    def _run_apart(self, warp: Warp) -> None:
        """One step of some lanes of a warp whose lanes are at different instructions."""
        steps = self.block.program.steps
        for pc in sorted(warp.parts):
            if pc >= len(steps) or not steps[pc].together:
                active = np.zeros((self.block.warps, WARP), bool)
                active[warp.number] = warp.parts.pop(pc)
                self._run_group([warp], pc, active.reshape(-1), 1)
                return
        where = [self.block.describe(pc) for pc in sorted(warp.parts)]
        raise self._located(Stuck(f"lanes of one warp wait for each other at {' and '.join(where)}"), warp)

    def _located(self, error: PtxError, warp: Warp, active: np.ndarray | None = None) -> PtxError:
        if not error.where:
            pc = next(iter(warp.parts), self.block.pc)
            if active is not None or not warp.parts:
                pc = self.block.pc
            warps = sorted(self.block.active_warps(active)) if active is not None else [warp.number]
            error.where = (
                f"  in program {self.block.position} (number {self.block.index}), warps {warps}, at instruction {pc}: "
                f"{self.block.describe(pc)}"
            )
        return error


_END = Step(lambda block, active: None, "exit", False)


class Trace:
    """Prints what runs: for people who look for a fault."""

    def __init__(self, program: int | None = None):
        self.program = program

    def show(self, block: Block, step: Step, active: np.ndarray | None) -> None:
        """The instruction that ``block`` is at, and who runs it: whole warps, or threads."""
        if self.program is not None and block.index != self.program:
            return
        lanes = np.ones(block.threads, bool) if active is None else active
        if step.predicate is not None:
            lanes = lanes & step.predicate.get(block)
        warps = block.active_warps(lanes)
        whole = lanes.reshape(-1, WARP)[warps].all()
        who = f"warps {ranges(warps)}" if whole else f"threads {ranges(np.flatnonzero(lanes).tolist())}"
        print(f"{block.index:>4} {block.pc:>5}  {who if warps else 'nobody':<24} {block.describe(block.pc)}")


def ranges(numbers: list[int]) -> str:
    """Ascending numbers, shortened.

    >>> ranges([0, 1, 2, 3, 7, 9, 10])
    '0-3,7,9-10'
    """
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def run_all(
    blocks: Iterator[Block], resident: int, random_source: random.Random | None, trace: Trace | None = None
) -> int:
    """Run the programs, at most ``resident`` at a time. Returns the number of steps."""
    live: list[BlockRun] = []
    total, more = 0, True
    with np.errstate(all="ignore"):
        while True:
            while more and len(live) < resident:
                block = next(blocks, None)
                more = block is not None
                if block is not None:
                    live.append(BlockRun(block, trace))
            if not live:
                return total
            run = live[0] if random_source is None else random_source.choice(live)
            run.advance()
            if run.done:
                run.block.keep(Mbarriers).check_finished()
                total += run.steps
                live.remove(run)
            elif random_source is None:
                live.append(live.pop(0))
