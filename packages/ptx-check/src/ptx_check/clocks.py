"""What happened before what, inside one program: vector clocks of its warps.

Every warp and every asynchronous agent (one for each mbarrier) has a number. ``seen[w, a]`` is the time up to which
everything that agent ``a`` did is known to have happened before what warp ``w`` does next. Barriers, waits and
acquires raise it; nothing else does. ``proxied[w, a]`` is the same for the asynchronous proxy (TMA, wgmma, tcgen05),
which sees what was written through ordinary instructions only after a ``fence.proxy.async``.

Times come from one counter for the whole program, so that "some readers at the latest at time t" (agent ``MANY``) can
be compared with what all warps are known to have done.

Between programs nothing is ordered but by a release and an acquire of the same word (`global_memory`): ``foreign[w]``
holds what warp ``w`` learnt of other programs that way.
"""

import numpy as np

AGENTS = 64
MANY = 63


class Clocks:
    def __init__(self, warps: int):
        self.warps = warps
        self.now = 1
        self.asynchronous = False  # whether agents other than warps write shared memory
        self.seen = np.zeros((warps, AGENTS), np.int64)
        self.proxied = np.zeros((warps, AGENTS), np.int64)
        self.foreign: list[dict[int, np.ndarray]] = [{} for _ in range(warps)]
        for warp in range(warps):
            self.seen[warp, warp] = self.now

    def time(self, warp: int) -> int:
        return int(self.seen[warp, warp])

    def tick(self, warp: int) -> None:
        """What the warp does from now on is later than what others may have learnt of it."""
        self.now += 1
        self.seen[warp, warp] = self.now

    def barrier(self, warps: list[int]) -> None:
        """Everything these warps did happens before everything they do next."""
        seen, proxied = self.seen[warps].max(0), self.proxied[warps].max(0)
        seen[warps] = self.now
        if len(warps) == self.warps:
            seen[MANY] = self.now
        self.seen[warps], self.proxied[warps] = seen, proxied
        foreign: dict[int, np.ndarray] = {}
        for warp in warps:
            _merge(foreign, self.foreign[warp])
        self.now += 1
        for warp in warps:
            self.seen[warp, warp] = self.now
            self.foreign[warp] = dict(foreign)

    def fence_proxy(self, warp: int) -> None:
        """The asynchronous proxy sees from now on what this warp sees."""
        self.proxied[warp] = np.maximum(self.proxied[warp], self.seen[warp])
        self.tick(warp)

    def release(self, warp: int) -> tuple[np.ndarray, np.ndarray]:
        """What someone who acquires from this warp now learns."""
        known = self.seen[warp].copy(), self.proxied[warp].copy()
        self.tick(warp)
        return known

    def acquire(self, warp: int, known: tuple[np.ndarray, np.ndarray]) -> None:
        own = self.time(warp)
        np.maximum(self.seen[warp], known[0], out=self.seen[warp])
        np.maximum(self.proxied[warp], known[1], out=self.proxied[warp])
        self.seen[warp, warp] = own

    def learn(self, warp: int, program: int, seen: np.ndarray) -> None:
        """Acquire what warps of another program did."""
        _merge(self.foreign[warp], {program: seen})


def _merge(into: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> None:
    for program, seen in other.items():
        into[program] = np.maximum(into[program], seen) if program in into else seen
