"""mbarrier objects of one program (PTX ISA 9.7.13.15), and the asynchronous operations that complete on them.

A phase ends when all expected arrivals and all expected bytes have come. Whoever waits for it learns what those who
arrived had done (and what copies wrote), nobody else does. What is in flight arrives only when asked to
(`arrive_late`), so that a kernel that does not wait sees it missing.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ptx_check.clocks import AGENTS, MANY
from ptx_check.errors import Misuse

if TYPE_CHECKING:
    from ptx_check.block import Block


@dataclass
class Mbarrier:
    agent: int  # its asynchronous agent, see `clocks`
    expected: int
    pending: int
    bytes: int = 0
    phase: int = 0
    known: np.ndarray = field(default_factory=lambda: np.zeros((2, AGENTS), np.int64))  # of the phase that runs
    completed: np.ndarray = field(default_factory=lambda: np.zeros((2, AGENTS), np.int64))  # of the last that ended
    in_flight: list[Callable[[], None]] = field(default_factory=list)

    def settle(self) -> None:
        """End the phase if nothing is missing."""
        if self.pending == 0 and self.bytes == 0:
            self.phase += 1
            self.pending = self.expected
            # A phase orders what the earlier ones did, too: they ended before it began.
            self.completed = np.maximum(self.completed, self.known)
            self.known = np.zeros((2, AGENTS), np.int64)


class Mbarriers:
    """Those of one program, by address in shared memory."""

    def __init__(self) -> None:
        self.at: dict[int, Mbarrier] = {}
        self.stalled: dict[int, int] = {}  # warp -> address of the mbarrier it waits for
        self.agents = 0

    def initialise(self, block: "Block", address: int, count: int) -> None:
        if address in self.at:
            raise Misuse(f"the mbarrier at {address} is initialised twice, with no mbarrier.inval between")
        agent = block.warps + self.agents
        if agent >= MANY:
            raise Misuse("more mbarriers than this interpreter numbers")
        self.agents += 1
        block.clocks.asynchronous = True
        self.at[address] = Mbarrier(agent, count, count)

    def find(self, block: "Block", address: int, warp: int) -> Mbarrier:
        """The mbarrier at an address, of whose initialisation the warp must know.

        No proxy fence is asked for between that and a copy: Triton 3.9 emits one in some kernels and not in others.
        """
        if address not in self.at:
            raise Misuse(f"there is no mbarrier at {address}: it was never initialised, or made invalid")
        index = np.arange(address, address + 8)[None]
        block.shared.check_read(block, index, np.array([warp * 32]), atomic=True)
        return self.at[address]

    def arrive(self, block: "Block", address: int, warp: int, count: int, expect: int) -> None:
        barrier = self.find(block, address, warp)
        if barrier.pending < count:
            raise Misuse(f"more arrivals at the mbarrier at {address} than its phase expects")
        barrier.known = np.maximum(barrier.known, np.stack(block.clocks.release(warp)))
        barrier.pending -= count
        barrier.bytes += expect
        barrier.settle()
        self.wake(address)

    def wait(self, block: "Block", address: int, warp: int, parity: int) -> bool:
        """Whether the phase of this parity has ended; if so, the warp learns what it ordered."""
        barrier = self.find(block, address, warp)
        if barrier.phase % 2 == parity:
            self.stalled[warp] = address
            return False
        block.clocks.acquire(warp, (barrier.completed[0], barrier.completed[1]))
        return True

    def wake(self, address: int) -> None:
        """Who waits for this mbarrier looks again."""
        for warp in [w for w, a in self.stalled.items() if a == address]:
            del self.stalled[warp]

    def arrive_late(self, block: "Block", random_source: random.Random | None) -> bool:
        """Let one operation that somebody waits for arrive. False if there is none."""
        waited = [a for a in dict.fromkeys(self.stalled.values()) if a in self.at and self.at[a].in_flight]
        if not waited:
            return False
        address = waited[0] if random_source is None else random_source.choice(waited)
        barrier = self.at[address]
        barrier.in_flight.pop(0)()
        barrier.settle()
        self.wake(address)
        return True

    def invalidate(self, block: "Block", address: int, warp: int) -> None:
        barrier = self.find(block, address, warp)
        if barrier.in_flight:
            raise Misuse(f"the mbarrier at {address} is made invalid while a copy on it is in flight")
        lanes = np.array([warp * 32])
        block.shared.check_write(block, np.arange(address, address + 8)[None], lanes)
        del self.at[address]

    def check_finished(self) -> None:
        if any(barrier.in_flight for barrier in self.at.values()):
            raise Misuse("the program ends while a copy is in flight")
