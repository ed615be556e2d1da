"""How many warps of a kernel an execution unit holds at once: what hides the latency of memory."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """One streaming multiprocessor or compute unit, from the vendors' public tables.

    ``registers`` are those of one scheduler's file for one lane; a warp takes them in multiples of ``granule``.
    ``shared`` is what all blocks have together, ``reserved`` what the system takes of it for each block.
    """

    schedulers: int
    warps: int  # for each scheduler
    blocks: int
    registers: int
    granule: int
    shared: int
    reserved: int = 0


_NVIDIA = {"schedulers": 4, "warps": 16, "blocks": 32, "registers": 512, "granule": 8, "reserved": 1024}
UNITS = {
    "sm_80": Unit(shared=164 << 10, **_NVIDIA),
    "sm_90": Unit(shared=228 << 10, **_NVIDIA),
    "sm_100": Unit(shared=228 << 10, **_NVIDIA),
    "gfx942": Unit(schedulers=4, warps=8, blocks=32, registers=512, granule=8, shared=64 << 10),
    "gfx1100": Unit(schedulers=2, warps=16, blocks=32, registers=1536, granule=24, shared=64 << 10),
}


def occupancy(target: str, warps: int, registers: int, shared: int) -> float:
    """Share of the warps that a unit can hold, for a kernel with so much of each resource.

    Args:
        target: a key of ``UNITS``. warps: of a block. registers: of a thread. shared: bytes of a block.

    >>> occupancy("sm_80", warps=8, registers=64, shared=0), occupancy("sm_80", warps=8, registers=65, shared=0)
    (0.5, 0.375)
    >>> occupancy("sm_90", warps=8, registers=32, shared=114 << 10)
    0.125
    """
    unit = UNITS[target]
    granules = -(-max(registers, 1) // unit.granule)
    at_once = min(unit.warps, unit.registers // (granules * unit.granule)) * unit.schedulers
    blocks = min(unit.blocks, at_once // warps)
    if shared + unit.reserved:
        blocks = min(blocks, unit.shared // (shared + unit.reserved))
    return blocks * warps / (unit.warps * unit.schedulers)
