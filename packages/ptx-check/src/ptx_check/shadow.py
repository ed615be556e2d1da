"""Who touched each byte last, packed into one integer, and whether an access races with that.

A stamp holds the agent (a warp, an mbarrier's asynchronous agent, or MANY), its lane, whether the access was atomic,
the instruction and the time. 0 is "nobody".
"""

import numpy as np

from ptx_check.clocks import MANY, Clocks

SEVERAL_LANES = 63


def stamp(agent: np.ndarray, lane: np.ndarray, atomic: bool, pc: int, time: np.ndarray) -> np.ndarray:
    return (
        np.asarray(time, np.int64) << 32
        | np.int64(pc << 13 | int(atomic) << 12)
        | np.asarray(lane, np.int64) << 6
        | np.asarray(agent, np.int64)
    )


def agent_of(stamps: np.ndarray) -> np.ndarray:
    return stamps & 63


def lane_of(stamps: np.ndarray) -> np.ndarray:
    return (stamps >> 6) & 63


def is_atomic(stamps: np.ndarray) -> np.ndarray:
    return ((stamps >> 12) & 1).astype(bool)


def pc_of(stamps: np.ndarray) -> np.ndarray:
    return (stamps >> 13) & 0x7FFFF


def time_of(stamps: np.ndarray) -> np.ndarray:
    return stamps >> 32


def unordered(stamps: np.ndarray, warps: np.ndarray, lanes: np.ndarray, clocks: Clocks) -> np.ndarray:
    """Where nothing orders what was ``stamps`` before what a lane of a warp does now.

    Lanes of one warp are ordered only by a barrier too: a warp need not run in lock step.
    """
    time = time_of(stamps)
    # Everything before a barrier of all warps is ordered, but for copies that nobody waited for: the usual case.
    if not clocks.asynchronous and time.max(initial=0) <= clocks.seen[:, MANY].min():
        return np.zeros(stamps.shape, bool)
    agent = agent_of(stamps)
    other = clocks.seen[warps, agent] < time
    sibling = (agent == warps) & (lane_of(stamps) != lanes) & (time == clocks.seen[warps, warps])
    return other | sibling


def merge_readers(shadow: np.ndarray, index: np.ndarray, own: np.ndarray, clocks: Clocks, warps: np.ndarray) -> None:
    """Note that ``own`` read the bytes at ``index``, without forgetting readers that nothing orders before."""
    before = shadow[index]
    kept = clocks.seen[warps, agent_of(before)] < time_of(before)
    kept |= (agent_of(before) == warps) & (lane_of(before) != lane_of(own)) & (time_of(before) == time_of(own))
    shadow[index] = own
    after = shadow[index]
    kept |= after != own
    if kept.any():
        where, mine, earlier = index[kept], np.broadcast_to(own, index.shape)[kept], before[kept]
        one_warp = agent_of(shadow[where]) == agent_of(mine)
        one_warp &= (clocks.seen[agent_of(mine) % clocks.warps, agent_of(earlier)] >= time_of(earlier)) | (
            agent_of(earlier) == agent_of(mine)
        )
        instruction = mine & np.int64(0x7FFFF << 13)
        shadow[where[one_warp]] = (mine | np.int64(SEVERAL_LANES << 6))[one_warp]
        shadow[where[~one_warp]] = (stamp(MANY, SEVERAL_LANES, False, 0, clocks.now) | instruction)[~one_warp]
