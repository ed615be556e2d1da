"""How much a row kernel has on its way from memory while it works, for kernels whose copies run ahead of their loop.

By Little's law an SM of an H100 needs 17 KB under way at all times, one of an H200 26 KB, for its share of the memory's
bandwidth: bytes a nanosecond times some 700 nanoseconds. Loads that a loop waits for at once are under way by turns;
those of a pipelined loop are still there while it works on what has come.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.static import sass
from benchmarks.static.occupancy import UNITS, occupancy


def bytes_behind_the_wait(code: Sequence[sass.Instruction]) -> float:
    """Bytes that a thread's copies to shared memory have left to bring when the loop goes on to work; 0 without any.

    A loop's wait names how many groups of copies may still be under way. Loads to registers do not count: the
    compiler may put them anywhere.
    """
    most = 0.0
    for loop in sass.natural_loops(list(code)):
        body = [code[i] for i in sorted(loop)]
        groups = sum(i.base == "LDGDEPBAR" for i in body)
        waits = [int(i.operands.split(",")[1], 16) for i in body if i.op == "DEPBAR.LE"]
        if groups and waits:
            most = max(most, min(waits) / groups * sum(i.bits for i in body if i.base == "LDGSTS") / 8)
    return most


def in_flight(kernel: Any, measured: dict[str, Any], target: str) -> dict[str, float]:
    """Of a compiled kernel and its measurement: ``in_flight``, bytes of all programs of an SM, and ``occupancy``."""
    share = occupancy(target, measured["warps"], measured["registers"], measured["shared"])
    threads = 32 * share * UNITS[target].warps * UNITS[target].schedulers
    of_a_thread = bytes_behind_the_wait(sass.disassemble(kernel.asm["cubin"]))
    return {"in_flight": threads * of_a_thread, "occupancy": share}
