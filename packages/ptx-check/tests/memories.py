"""Memory for the tests of loads and stores."""

import numpy as np

from ptx_check.global_memory import GlobalMemory

TID = "mov.u32 %r30, %tid.x; shl.b32 %r31, %r30, 2;"  # %r31: the thread's word


def in_global(x: np.ndarray) -> tuple[GlobalMemory, int]:
    memory = GlobalMemory()
    return memory, memory.add("x", x.reshape(-1).view(np.uint8), np.ones(x.nbytes, bool))


def per_lane(base: int, step: int, lanes: int = 32) -> np.ndarray:
    return np.uint64(base) + np.uint64(step) * np.arange(lanes, dtype=np.uint64)
