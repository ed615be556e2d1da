"""Shared memory of one program: bytes, who wrote and read them, and which are being written by a copy in flight."""

from typing import TYPE_CHECKING

import numpy as np

from ptx_check import shadow
from ptx_check.errors import Misuse, OutOfBounds, Race, Uninitialised

if TYPE_CHECKING:
    from ptx_check.block import Block


class SharedMemory:
    name = "shared memory"

    def __init__(self, size: int, dtype: type = np.uint8, readers: int = 1):
        """``readers``: 1, or the number of warps: each byte then remembers the readers of each warp apart. That takes
        time, and is needed where barriers order some warps alone: of several readers in one only the last counts."""
        self.size = size
        self.data = np.full(size, 0xCD, dtype)
        self.written = np.zeros(size, bool)
        self.undefined = np.zeros(size, bool)  # written, but from a register that never was
        self.in_flight = np.zeros(size, bool)
        self.writes = np.zeros(size, np.int64)  # stamps, see `shadow`
        self.reads = np.zeros((readers, size), np.int64)

    def index(self, address: np.ndarray, size: int, alignment: int | None = None) -> np.ndarray:
        """[lanes, size] indices of the bytes of an access."""
        address = address.astype(np.int64)
        if ((address < 0) | (address + size > self.size)).any():
            cure = "" if self.size else ": pass shared_bytes (--shared), which Triton has in kernel.metadata.shared"
            raise OutOfBounds(
                f"an access to bytes {address.min()} to {address.max() + size} of shared memory, which has {self.size}"
                f"{cure}"
            )
        if (address % (alignment or size)).any():
            raise OutOfBounds(f"an access of {size} bytes to shared memory at {address[address % size != 0][0]}")
        return address[:, None] + np.arange(size)

    def load(
        self, block: "Block", address: np.ndarray, size: int, lanes: np.ndarray, atomic: bool = False, parts: int = 1
    ) -> np.ndarray:
        """[lanes, size] bytes at ``address`` [lanes], read by the threads ``lanes``.

        Args:
            parts: registers that the bytes go to. Compilers read four numbers at once where they want three, so one
                that was never written is undefined (`undefined_at`); it is an error where all of them are.
        """
        index = self.index(address, size)
        self.check_read(block, index, lanes, atomic, all_written=parts == 1)
        if parts > 1 and not (some := self.written[index].any(1)).all():
            raise self._unwritten(index[~some])
        return self.data[index]

    def _unwritten(self, index: np.ndarray) -> Uninitialised:
        return Uninitialised(f"reads byte {int(index[~self.written[index]][0])} of {self.name}, which nobody wrote")

    def check_read(
        self, block: "Block", index: np.ndarray, lanes: np.ndarray, atomic: bool = False, all_written: bool = True
    ) -> None:
        warps, inside = (lanes // 32)[:, None], (lanes % 32)[:, None]
        if self.in_flight[index].any():
            raise Race(f"reads {self.name} that an operation in flight is going to write")
        if all_written and not self.written[index].all():
            raise self._unwritten(index)
        writes = self.writes[index]
        bad = shadow.unordered(writes, warps, inside, block.clocks)
        if atomic:
            bad &= ~shadow.is_atomic(writes)
        if bad.any():
            raise Race(block.race("reads", "written", writes[bad][0], index[bad][0], self.name))
        if not atomic:
            own = shadow.stamp(warps, inside, False, block.pc, block.clocks.seen[warps, warps])
            flat = index + warps * self.size if len(self.reads) > 1 else index
            shadow.merge_readers(self.reads.reshape(-1), flat, np.broadcast_to(own, index.shape), block.clocks, warps)

    def check_write(
        self, block: "Block", index: np.ndarray, lanes: np.ndarray, data: np.ndarray | None = None, atomic: bool = False
    ) -> None:
        """Raise if something that nothing orders before touched these bytes; writing what is there is no race."""
        warps, inside = (lanes // 32)[:, None], (lanes % 32)[:, None]
        if self.in_flight[index].any():
            raise Race(f"writes {self.name} that an operation in flight is going to write")
        for readers in self.reads:
            reads = readers[index]
            bad = shadow.unordered(reads, warps, inside, block.clocks)
            if bad.any():
                raise Race(block.race("writes", "read", reads[bad][0], index[bad][0], self.name))
        writes = self.writes[index]
        bad = shadow.unordered(writes, warps, inside, block.clocks)
        if atomic:
            bad &= ~shadow.is_atomic(writes)
        if data is not None:
            bad &= self.data[index] != data
        if bad.any():
            raise Race(block.race("writes", "written", writes[bad][0], index[bad][0], self.name))

    def store(
        self,
        block: "Block",
        address: np.ndarray,
        data: np.ndarray,
        lanes: np.ndarray,
        atomic: bool = False,
        undefined: np.ndarray | None = None,
        alignment: int | None = None,
    ) -> None:
        """Write ``data`` [lanes, size]. Where ``undefined`` [lanes], who reads the bytes gets undefined registers.

        Lanes of one warp may write different values to one place in one instruction: one of them stays, and the ISA
        leaves open which (9.7.9.12). The seed chooses.
        """
        index = self.index(address, data.shape[1], alignment)
        self.check_write(block, index, lanes, data, atomic)
        self.write(block, index, data, lanes, atomic)
        if undefined is not None:
            self.undefined[index[undefined]] = True
        elif not atomic and (lost := (self.data[index] != data).any(1)).any():
            warps = shadow.agent_of(self.writes[index[lost]])
            others = warps != (lanes[lost] // 32)[:, None]
            if (others & (self.data[index[lost]] != data[lost])).any():
                raise Race("two warps write different values to one byte of shared memory in the same instruction")
            if block.random is not None:
                order = np.array(block.random.sample(range(len(lanes)), len(lanes)))
                self.write(block, index[order], data[order], lanes[order])

    def write(
        self, block: "Block", index: np.ndarray, data: np.ndarray, lanes: np.ndarray, atomic: bool = False
    ) -> None:
        warps = (lanes // 32)[:, None]
        self.data[index] = data
        self.written[index] = True
        self.undefined[index] = False
        own = shadow.stamp(warps, (lanes % 32)[:, None], atomic, block.pc, block.clocks.seen[warps, warps])
        self.writes[index] = np.broadcast_to(own, index.shape)

    def undefined_at(self, address: np.ndarray, size: int) -> np.ndarray | None:
        """[lanes]: of which accesses some byte is undefined, or None if there are none."""
        index = address.astype(np.int64)[:, None] + np.arange(size)
        bad = (self.undefined[index] | ~self.written[index]).any(1)
        return bad if bad.any() else None

    def check_async_read(self, block: "Block", index: np.ndarray, warp: int) -> None:
        """wgmma and tcgen05 read through the asynchronous proxy, on behalf of a warp."""
        if self.undefined[index].any():
            raise Uninitialised(f"a matrix product depends on undefined bytes of {self.name}")
        index = index.reshape(1, -1)
        self.check_read(block, index, np.array([warp * 32]))
        self._check_proxied(block, index, warp)

    def check_async_write(self, block: "Block", index: np.ndarray, warp: int) -> None:
        """TMA writes through the asynchronous proxy, on behalf of a warp."""
        index = index.reshape(1, -1)
        self.check_write(block, index, np.array([warp * 32]))
        self._check_proxied(block, index, warp)

    def _check_proxied(self, block: "Block", index: np.ndarray, warp: int) -> None:
        writes = self.writes[index]
        agent = shadow.agent_of(writes)
        generic = (agent < block.clocks.warps) | (agent == shadow.MANY)
        bad = generic & (shadow.time_of(writes) > block.clocks.proxied[warp, agent])
        if bad.any():
            raise Misuse(
                block.race("touches asynchronously", "written", writes[bad][0], index[bad][0])
                + ", and no fence.proxy.async lies between"
            )
