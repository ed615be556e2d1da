"""Matrix products of a whole block on tensor memory (PTX ISA 9.7.16: tcgen05, sm_100).

Tensor memory is 128 lanes of 512 columns of 32 bits. One thread issues products, which run in order, read their
operands and write tensor memory only when the mbarrier of their commit is waited for. What the warps store is not there
before tcgen05.wait::st. Known are products of 64 or 128 rows of 16-bit elements, which sum in float32.

Not checked: tcgen05.wait::ld. Triton 3.9 lets LLVM use the registers of tcgen05.ld before it.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ptx_check import shadow
from ptx_check.bits import WARP, halves
from ptx_check.decode import Instruction
from ptx_check.errors import Misuse, OutOfBounds, PtxError
from ptx_check.mbarriers import Mbarriers
from ptx_check.operands import Operands, Source
from ptx_check.ops_copy import for_each_warp
from ptx_check.ops_wgmma import DEPTH, Operand
from ptx_check.shared_memory import SharedMemory
from ptx_check.table import Run, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block

LANES, COLUMNS = 128, 512
SWIZZLES = {2: 128, 4: 64, 6: 32}  # bytes, by bits 61 to 63 of a descriptor (9.7.16.4.1)
FORMATS = {0: "f16", 1: "bf16"}


class TensorMemory(SharedMemory):
    """Words instead of bytes, numbered lane * 512 + column; the same rules hold."""

    name = "tensor memory"

    def __init__(self) -> None:
        super().__init__(LANES * COLUMNS, np.uint32)
        self.allocated = 0
        self.storing: dict[int, list[np.ndarray]] = {}  # of each warp: words whose stores were not waited for
        self.products: list[Product] = []

    def words(self, lanes: np.ndarray, columns: np.ndarray) -> np.ndarray:
        """Indices of words, which must be allocated."""
        if (columns < 0).any() or (columns >= self.allocated).any() or (lanes >= LANES).any():
            raise OutOfBounds(f"tensor memory has {self.allocated} columns here; column {columns.max()}")
        return lanes * COLUMNS + columns


@dataclass
class Product:
    """One product in flight."""

    left: "Operand | np.ndarray"  # in shared memory, or words of tensor memory [rows, 8]
    right: Operand
    result: np.ndarray  # words [rows, N]
    adds: bool
    kind: str
    pc: int
    agent: int = -1  # of the mbarrier it completes on
    time: int = 0
    done: bool = False

    def finish(self, block: "Block") -> None:
        memory = block.keep(TensorMemory)
        if isinstance(self.left, Operand):
            left = self.left.read(block, self.kind)
        else:
            left = halves(memory.data[self.left].reshape(-1), self.kind).reshape(-1, DEPTH)
        product = left.astype(np.float64) @ self.right.read(block, self.kind).T.astype(np.float64)
        if self.adds:
            product = product + memory.data[self.result].view(np.float32)
        memory.data[self.result] = product.astype(np.float32).view(np.uint32)
        memory.written[self.result] = True
        block.clocks.now += 1
        self.time, self.done = block.clocks.now, True
        mark = shadow.stamp(self.agent, shadow.SEVERAL_LANES, False, self.pc, self.time)
        memory.writes[self.result] = mark
        for operand in (self.left, self.right):
            if isinstance(operand, Operand):
                block.shared.reads[0, operand.bytes] = mark
            else:
                memory.reads[0, operand] = mark
        if not any((p.result == self.result[0, 0]).any() for p in memory.products if not p.done):
            memory.in_flight[self.result] = False


@entry("tcgen05")
def _tcgen05(instruction: Instruction, operands: Operands) -> Run:
    action = instruction.opcode[1]
    if action in ("alloc", "dealloc", "relinquish_alloc_permit"):
        return _allocation(instruction, operands)
    if action in ("ld", "st"):
        return _transfer(instruction, operands)
    if action == "mma":
        return _multiply(instruction, operands)
    if action == "commit":
        return _commit(instruction, operands)
    if instruction.opcode[1:] == ("wait::ld", "sync", "aligned"):
        return for_each_warp(lambda block, warp: None)
    if instruction.opcode[1:] == ("wait::st", "sync", "aligned"):
        return for_each_warp(_stores_arrive)
    raise unknown(instruction)


def _stores_arrive(block: "Block", warp: int) -> None:
    memory = block.keep(TensorMemory)
    for words in memory.storing.pop(warp, []):
        memory.in_flight[words] = False


def _allocation(instruction: Instruction, operands: Operands) -> Run:
    """9.7.16.7: the address of the columns is written to shared memory; here it is 0."""
    action = instruction.opcode[1]
    modifiers(instruction, action, "cta_group::1", "sync", "aligned", "shared::cta", "b32")
    if action == "relinquish_alloc_permit":
        return for_each_warp(lambda block, warp: None)
    count = operands.read(instruction.operands[1], "u32")
    place = (
        operands.address(instruction.operands[0])
        if action == "alloc"
        else operands.read(instruction.operands[0], "u32")
    )

    def run(block: "Block", active: np.ndarray | None) -> None:
        (warp,) = block.active_warps(active)
        memory = block.keep(TensorMemory)
        where, columns = place.get(block)[warp * WARP], int(count.get(block)[warp * WARP])
        if action == "dealloc":
            if int(where) != 0 or columns != memory.allocated or not all(p.done for p in memory.products):
                raise Misuse("tensor memory is given back that was not allocated, or with a product in flight")
            every = memory.words(np.arange(LANES)[:, None], np.arange(columns)[None, :])
            memory.check_write(block, every.reshape(1, -1), np.array([warp * WARP]))  # nobody may still use them
            memory.allocated = 0
            return
        if memory.allocated or columns not in (32, 64, 128, 256, 512):
            raise Misuse(f"{columns} columns of tensor memory cannot be allocated")
        memory.allocated = columns
        lane = np.array([warp * WARP])
        block.shared.store(block, np.array([where]), np.zeros((1, 4), np.uint8), lane)

    return run


def _transfer(instruction: Instruction, operands: Operands) -> Run:
    """9.7.16.8 ld, st: .32x32b gives lane l of a warp row l; .16x32bx2 lanes l and l + 16 parts of row l."""
    match = re.fullmatch(r"(ld|st)\.sync\.aligned\.(32x32b|16x32bx2)\.x(\d+)\.b32", ".".join(instruction.opcode[1:]))
    if match is None:
        raise unknown(instruction)
    loads, split, count = match[1] == "ld", match[2] == "16x32bx2", int(match[3])
    texts = list(instruction.operands)
    vector = texts.pop(0 if loads else -1)
    address = operands.address(texts[0])
    offset = int(texts[1], 0) if split else 0
    targets, values = operands.write_vector(vector, "b32"), operands.vector(vector, "b32")
    if len(values) != count or len(texts) != 1 + split:
        raise unknown(instruction)
    slots = tuple(slot for value in values for slot in value.slots)

    def run(block: "Block", active: np.ndarray | None) -> None:
        memory = block.keep(TensorMemory)
        where = block.value(address, active, "an address")
        result, unwritten = np.zeros((2, block.warps, WARP, count), np.uint32)
        if not loads:
            block.require(slots, active, "a store to tensor memory")
        for warp in block.active_warps(active):
            base = int(where[warp * WARP])
            first, column = base >> 16, base & 0xFFFF
            if first // 32 != warp % 4 or (first % 32 and not split):
                raise Misuse(f"warp {warp} may not touch lane {first} of tensor memory")
            lane = np.arange(WARP)
            rows = first + (lane % 16 if split else lane)
            columns = column + np.arange(count) + np.where(split & (lane >= 16), offset, 0)[:, None]
            words = memory.words(rows[:, None], columns)
            threads = warp * WARP + lane
            if loads:
                # The compiler loads before it knows whether there was a product; then nothing depends on the result.
                memory.check_read(block, words, threads, all_written=False)
                result[warp], unwritten[warp] = memory.data[words], ~memory.written[words]
            else:
                data = np.stack([value.get(block).reshape(-1, WARP)[warp] for value in values], 1)
                memory.check_write(block, words, threads)
                memory.write(block, words, data, threads)
                memory.in_flight[words] = True
                memory.storing.setdefault(warp, []).append(words)
        if loads:
            flat, undefined = result.reshape(-1, count), unwritten.reshape(-1, count) != 0
            for i, target in enumerate(targets):
                target.put(block, np.ascontiguousarray(flat[:, i]), active)
                if undefined[:, i].any():
                    block.mark_undefined(target.slots[0], undefined[:, i])

    return run


def _multiply(instruction: Instruction, operands: Operands) -> Run:
    """9.7.16.10.9 mma: what is multiplied is said by an instruction descriptor (9.7.16.4.2)."""
    modifiers(instruction, "mma", "cta_group::1", "kind::f16")
    texts = instruction.operands
    if len(texts) != 5:
        raise unknown(instruction)
    in_tensor_memory = texts[1].startswith("[")
    result = operands.address(texts[0])
    left = operands.address(texts[1]) if in_tensor_memory else operands.read(texts[1], "u64")
    right, description, keep = (
        operands.read(texts[2], "u64"),
        operands.read(texts[3], "u32"),
        operands.read(texts[4], "pred"),
    )
    sources: tuple[Source, ...] = (result, left, right, description, keep)
    slots = tuple(slot for source in sources for slot in source.slots)

    def run(block: "Block", active: np.ndarray | None) -> None:
        block.require(slots, active, "a matrix product")
        for thread in block.lanes(active).tolist():
            d, a, b, how, adds = (int(source.get(block)[thread]) for source in sources)
            _issue(block, thread // WARP, d, a, b, how, bool(adds))

    def _issue(block: "Block", warp: int, d: int, a: int, b: int, how: int, adds: bool) -> None:
        kind, rows, columns = FORMATS.get(how >> 7 & 7), (how >> 24 & 31) << 4, (how >> 17 & 63) << 3
        # All but formats, transpositions and sizes: only "the result is float32" (bit 4).
        known = how & 0xE080607F == 0x10 and how >> 10 & 7 == how >> 7 & 7
        if kind is None or rows not in (64, LANES) or not known:
            raise PtxError(f"the instruction descriptor {how:#x} is not known here")
        memory, row = block.keep(TensorMemory), np.arange(rows)[:, None]
        # 9.7.16.10.5: 128 rows take a lane each, 64 rows the first (or, by the address, second) 16 of every 32 lanes.
        lanes = row if rows == LANES else row // 16 * 32 + row % 16
        left: Operand | np.ndarray
        if in_tensor_memory:
            left = memory.words((a >> 16) + lanes, (a & 0xFFFF) + np.arange(DEPTH // 2)[None, :])
            memory.check_read(block, left.reshape(1, -1), np.array([warp * WARP]))
        else:
            left = Operand(block, warp, a, np.arange(rows), bool(how >> 15 & 1), SWIZZLES.get(a >> 61))
        right = Operand(block, warp, b, np.arange(columns), bool(how >> 16 & 1), SWIZZLES.get(b >> 61))
        words = memory.words((d >> 16) + lanes, (d & 0xFFFF) + np.arange(columns)[None, :])
        mine = [p for p in memory.products if not p.done and np.array_equal(p.result, words)]
        if not mine:  # products of one result run in order; anything else must be over
            memory.check_write(block, words.reshape(1, -1), np.array([warp * WARP]))
            if adds and not memory.written[words].all():
                raise PtxError("a matrix product adds to tensor memory that nobody wrote")
        memory.in_flight[words] = True
        memory.products = [p for p in memory.products if not p.done]
        memory.products.append(Product(left, right, words, adds, kind, block.pc))

    return run


def _commit(instruction: Instruction, operands: Operands) -> Run:
    """9.7.16.10.7: an arrival at the mbarrier when all products issued so far are complete."""
    modifiers(instruction, "commit", "cta_group::1", "mbarrier::arrive::one", "shared::cluster", "b64")
    address = operands.address(instruction.operands[0])

    def run(block: "Block", active: np.ndarray | None) -> None:
        memory, where = block.keep(TensorMemory), block.value(address, active, "an address")
        for thread in block.lanes(active).tolist():
            barrier = block.keep(Mbarriers).find(block, int(where[thread]), thread // WARP)
            before = list(memory.products)
            for product in before:
                product.agent = barrier.agent if product.agent < 0 else product.agent

            def arrive(barrier=barrier, before=before) -> None:
                for product in before:
                    if not product.done:
                        product.finish(block)
                    known = barrier.known[0]
                    known[product.agent] = max(known[product.agent], product.time)
                barrier.pending -= 1

            barrier.in_flight.append(arrive)

    return run
