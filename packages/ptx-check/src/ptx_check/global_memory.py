"""Global memory: the tensors a kernel was given, their bounds, and what orders the accesses of several programs.

Each storage lies in an address range of its own, a terabyte from the next, so an address says to which it belongs.
Only bytes that a tensor of the call covers may be touched: not the gaps between the rows of a view.

The memory model is that of races. Data written by one program may be read by another only if a release of the writer,
on a word, was acquired by the reader, at a scope that holds both; everything else is reported, whatever value the
reader would have got. A program free of such races cannot tell a weak memory from a strong one, so finding none under
any schedule is as much as running with stores that arrive late and in any order (Adve and Hill 1990; PTX ISA, memory
consistency model, 8.10).
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ptx_check import shadow
from ptx_check.clocks import AGENTS
from ptx_check.errors import OutOfBounds, Race

if TYPE_CHECKING:
    from ptx_check.block import Block

_SHIFT = 40  # a storage's addresses start at its number times 2^40


class Region(NamedTuple):
    """One storage: its bytes, which of them may be touched, and who touched them."""

    name: str
    data: np.ndarray
    allowed: np.ndarray
    writes: np.ndarray
    reads: np.ndarray
    writer: np.ndarray  # program that wrote last
    reader: np.ndarray  # program that read last; SEVERAL after a second one


SEVERAL = -2


class GlobalMemory:
    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.words: dict[int, dict[int, np.ndarray]] = {}  # what a word's last release makes known, by program

    def add(self, name: str, data: np.ndarray, allowed: np.ndarray) -> int:
        """Address of the first byte of ``data``."""
        n = data.size
        self.regions.append(
            Region(name, data, allowed, np.zeros(n, np.int64), np.zeros(n, np.int64), np.full(n, -1), np.full(n, -1))
        )
        return len(self.regions) << _SHIFT

    def load(
        self, block: "Block", address: np.ndarray, size: int, lanes: np.ndarray, atomic: bool = False
    ) -> np.ndarray:
        """[lanes, size] bytes at ``address`` [lanes], read by the threads ``lanes``."""
        out = np.empty((len(address), size), np.uint8)
        for region, part, index in self._located(address, size):
            if not atomic:
                self._check(block, region, index, lanes[part], reading=True)
            out[part] = region.data[index]
        return out

    def store(
        self, block: "Block", address: np.ndarray, data: np.ndarray, lanes: np.ndarray, atomic: bool = False
    ) -> None:
        for region, part, index in self._located(address, data.shape[1]):
            self._check(block, region, index, lanes[part], False, atomic, data[part])
            region.data[index] = data[part]
            if not atomic and (region.data[index] != data[part]).any():
                raise Race(f"two threads write different values to one byte of {region.name} in the same instruction")

    def read_bytes(self, block: "Block", address: np.ndarray, warp: int) -> np.ndarray:
        """Bytes at any addresses, read by a copy engine on behalf of a warp."""
        lanes = np.full(len(address), warp * 32)
        return self.load(block, address, 1, lanes)[:, 0]

    def synchronise(self, block: "Block", address: int, warp: int, release: bool, acquire: bool) -> None:
        """An atomic on a word: pass on what this warp knows, learn what the word's earlier releases knew."""
        word = self.words.setdefault(address, {})
        if acquire:
            for program, seen in word.items():
                if program == block.index:
                    block.clocks.acquire(warp, (seen, np.zeros(AGENTS, np.int64)))
                else:
                    block.clocks.learn(warp, program, seen)
        if release:
            # A later release of the same word continues the sequence of the earlier ones.
            known = {**block.clocks.foreign[warp], block.index: block.clocks.release(warp)[0]}
            for program, seen in known.items():
                word[program] = np.maximum(word[program], seen) if program in word else seen

    def _located(self, address: np.ndarray, size: int):
        """(region, lanes that touch it, [lanes, size] indices) for each storage that is touched."""
        number = address >> np.uint64(_SHIFT)
        offset = (address & np.uint64((1 << _SHIFT) - 1)).astype(np.int64)
        if (offset % size).any():
            raise OutOfBounds(f"an access of {size} bytes to global memory at an address that is not a multiple of it")
        for one in np.unique(number):
            if not 1 <= one <= len(self.regions):
                raise OutOfBounds(
                    f"an access of {size} bytes to address {int(address[number == one][0]):#x}: no tensor"
                )
            region, part = self.regions[int(one) - 1], number == one
            index = offset[part][:, None] + np.arange(size)
            outside = (index >= region.data.size) | ~region.allowed[np.minimum(index, region.data.size - 1)]
            if outside.any():
                raise OutOfBounds(
                    f"an access of {size} bytes to byte {int(index[outside][0])} of the storage of {region.name}, "
                    f"which has {region.data.size} bytes, of which its tensors cover {int(region.allowed.sum())}"
                )
            yield region, part, index

    def _check(
        self,
        block: "Block",
        region: Region,
        index: np.ndarray,
        lanes: np.ndarray,
        reading: bool,
        atomic: bool = False,
        data: np.ndarray | None = None,
    ) -> None:
        warps, inside = (lanes // 32)[:, None], (lanes % 32)[:, None]
        writes = region.writes[index]
        bad = _unordered(block, writes, region.writer[index], warps, inside)
        if atomic:
            bad &= ~shadow.is_atomic(writes)
        elif data is not None:
            bad &= region.data[index] != data
        if bad.any():
            verb = "reads" if reading else "writes"
            raise Race(
                _words(block, verb, "written", region, region.writer[index][bad][0], writes[bad][0], index[bad][0])
            )
        own = np.broadcast_to(
            shadow.stamp(warps, inside, atomic, block.pc, block.clocks.seen[warps, warps]), index.shape
        )
        if reading:
            before = region.reader[index]
            mixed = (before != -1) & (before != block.index)
            shadow.merge_readers(region.reads, index, own, block.clocks, warps)
            region.reader[index] = np.where(mixed, SEVERAL, block.index)
            return
        reads, reader = region.reads[index], region.reader[index]
        bad = _unordered(block, reads, reader, warps, inside) & (reader != -1)
        if data is not None:
            bad &= region.data[index] != data
        if bad.any() and not atomic:
            raise Race(_words(block, "writes", "read", region, reader[bad][0], reads[bad][0], index[bad][0]))
        region.writes[index] = own
        region.writer[index] = block.index


def _unordered(
    block: "Block", stamps: np.ndarray, programs: np.ndarray, warps: np.ndarray, inside: np.ndarray
) -> np.ndarray:
    own = programs == block.index
    bad = np.zeros(stamps.shape, bool)
    if own.any():
        bad |= own & shadow.unordered(np.where(own, stamps, 0), warps, inside, block.clocks)
    others = (programs != -1) & ~own
    for program in np.unique(programs[others]):
        theirs = programs == program
        agent, time = shadow.agent_of(stamps), shadow.time_of(stamps)
        known = np.zeros((block.clocks.warps, AGENTS), np.int64)
        for warp in np.unique(warps):
            if program in block.clocks.foreign[warp]:
                known[warp] = block.clocks.foreign[warp][program]
        bad |= theirs & (known[warps, agent] < time)
    return bad


def _words(block: "Block", verb: str, done: str, region: Region, program: int, stamp: int, byte: int) -> str:
    other = "several programs" if program == SEVERAL else f"program {int(program)}"
    what = f" by {block.describe(int(shadow.pc_of(stamp)))}" if program != SEVERAL else ""
    return f"{verb} byte {int(byte)} of {region.name}, which {other} has {done}{what}; nothing orders the two"
