"""Matrix products of four warps, which run asynchronously (PTX ISA 9.7.15: wgmma).

Operands are read when the product is waited for, as late as the rules allow: whoever overwrites them before is caught.
Until then the registers of the result may not be touched.
"""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx_check.bits import WARP, widen_bfloat16
from ptx_check.decode import Instruction, Kernel, split_operands
from ptx_check.errors import Misuse, OutOfBounds, PtxError
from ptx_check.operands import Operands
from ptx_check.ops_copy import for_each_warp
from ptx_check.ops_matrix import A_COLUMN, A_ROW, GROUP, IN_GROUP, fragments
from ptx_check.ops_tma import swizzle
from ptx_check.table import Run, entry, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block

SWIZZLES = {1: 128, 2: 64, 3: 32}  # bytes, by bits 62 and 63 of a descriptor
DEPTH = 16  # of one product of 16-bit elements


def operand_index(descriptor: int, rows: np.ndarray, transposed: bool, width: int | None) -> np.ndarray:
    """[rows, 16] shared-memory addresses of the elements of an operand (PTX ISA 9.7.15.5.1: matrix descriptor).

    Args:
        rows: along M or N. transposed: those lie next to each other (MN-major), not the depth (K-major).
        width: bytes of the swizzle, which wgmma and tcgen05 encode differently.
    """
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    if width is None or descriptor >> 49 & 7:
        raise PtxError("an operand without swizzle, or with a base offset, is not known here")
    k = np.arange(DEPTH)[None, :]
    rows = rows[:, None]
    if transposed:
        across = width // 2  # elements of a line
        address = start + rows // across * leading + rows % across * 2 + k % 8 * width + k // 8 * stride
    else:
        address = start + rows // 8 * stride + rows % 8 * width + k * 2
    return swizzle(address, width)


def read_operand(block: "Block", index: np.ndarray, kind: str) -> np.ndarray:
    """float32 elements at ``index``, without checks."""
    bits = block.shared.data[index[..., None] + np.arange(2)].view(np.uint16)[..., 0]
    return widen_bfloat16(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


class Operand:
    """A tile in shared memory that a product in flight is going to read."""

    def __init__(
        self, block: "Block", warp: int, descriptor: int, rows: np.ndarray, transposed: bool, width: int | None
    ):
        self.elements = operand_index(descriptor, rows, transposed, width)
        self.bytes = (self.elements[..., None] + np.arange(2)).reshape(-1)
        if self.bytes.min() < 0 or self.bytes.max() >= block.shared.size:
            raise OutOfBounds("a matrix operand lies outside of shared memory")
        block.shared.check_async_read(block, self.bytes, warp)
        self.before = block.shared.writes[self.bytes]

    def read(self, block: "Block", kind: str) -> np.ndarray:
        """The elements, once the product is due."""
        if (block.shared.writes[self.bytes] != self.before).any() or block.shared.in_flight[self.bytes].any():
            raise Misuse("shared memory was overwritten while a matrix product in flight reads it")
        return read_operand(block, self.elements, kind)


class Products:
    """Of each warp: products since the last commit, and the committed groups, oldest first."""

    def __init__(self) -> None:
        self.open: dict[int, list[tuple[set[int], Callable[[], None]]]] = {}
        self.groups: dict[int, list[list[tuple[set[int], Callable[[], None]]]]] = {}

    def commit(self, warp: int) -> None:
        self.groups.setdefault(warp, []).append(self.open.pop(warp, []))

    def wait(self, block: "Block", warp: int, pending: int) -> None:
        groups = self.groups.get(warp, [])
        while len(groups) > pending:
            group = groups.pop(0)
            for _, finish in group:
                finish()
            still = [r for later in (*groups, self.open.get(warp, [])) for r, _ in later]
            for slot in set().union(*(r for r, _ in group)).difference(*still):
                block.locked[slot].discard(warp)
                if not block.locked[slot]:
                    del block.locked[slot]


@entry("wgmma")
def _wgmma(instruction: Instruction, operands: Operands) -> Run:
    words = instruction.opcode[1:]
    if words == ("fence", "sync", "aligned"):
        return for_each_warp(lambda block, warp: None)  # `check_fences` reads where it stands
    if words == ("commit_group", "sync", "aligned"):
        return for_each_warp(lambda block, warp: block.keep(Products).commit(warp))
    if words == ("wait_group", "sync", "aligned"):
        pending = int(instruction.operands[0], 0)
        return for_each_warp(lambda block, warp: block.keep(Products).wait(block, warp, pending))
    return _multiply(instruction, operands)


def _multiply(instruction: Instruction, operands: Operands) -> Run:
    match = re.fullmatch(
        r"mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", ".".join(instruction.opcode[1:])
    )
    if match is None:
        raise unknown(instruction)
    columns, kind = int(match[1]), match[2]
    texts = instruction.operands
    results = operands.vector(texts[0], "f32")
    targets = operands.write_vector(texts[0], "f32")
    in_registers = texts[1].startswith("{")
    left = operands.vector(texts[1], "b32") if in_registers else [operands.read(texts[1], "u64")]
    right, keep = operands.read(texts[2], "u64"), operands.read(texts[3], "pred")
    if texts[4:6] != ("1", "1") or len(results) != columns // 2 or len(texts) != (7 if in_registers else 8):
        raise unknown(instruction)
    transposed = [flag == "1" for flag in texts[6:]]
    inputs = tuple(slot for source in (*left, right, keep) for slot in source.slots)
    slots = {slot for target in targets for slot in target.slots}
    number = np.arange(columns // 2)[:, None]
    row, column = GROUP[None, :] + 8 * (number >> 1 & 1), 8 * (number // 4) + 2 * IN_GROUP[None, :] + (number & 1)

    def run(block: "Block", active: np.ndarray | None) -> None:
        block.require(inputs, active, "wgmma")
        for warp in block.active_warps(active):
            _issue(block, warp)

    def _issue(block: "Block", warp: int) -> None:
        lane = warp * WARP
        adds = bool(keep.get(block)[lane])
        mine = np.zeros(block.threads, bool)
        mine[lane : lane + WARP] = True
        if adds:
            free = tuple(slot for slot in slots if warp not in block.locked.get(slot, ()))
            block.require(free, mine, "the accumulator of wgmma")
        rows = 16 * (warp % 4) + np.arange(16)
        a: Operand | np.ndarray
        if in_registers:
            a = np.stack([source.get(block)[mine] for source in left])
        else:
            one = int(left[0].get(block)[lane])
            a = Operand(block, warp, one, rows, transposed[0], SWIZZLES.get(one >> 62))
        other = int(right.get(block)[lane])
        b = Operand(block, warp, other, np.arange(columns), transposed[-1], SWIZZLES.get(other >> 62))

        def finish() -> None:
            if isinstance(a, Operand):
                first = a.read(block, kind).astype(np.float64)
                block.shared.check_async_read(block, a.bytes, warp)
            else:
                if any((source.get(block)[mine] != was).any() for source, was in zip(left, a, strict=True)):
                    raise Misuse("registers were overwritten while a wgmma in flight reads them")
                first = np.zeros((16, DEPTH))
                first[A_ROW, A_COLUMN] = fragments(block, left, kind, [warp])[0]
            product = first @ b.read(block, kind).T.astype(np.float64)
            block.shared.check_async_read(block, b.bytes, warp)
            value = product[row, column]
            if adds:
                value = value + np.stack([block.registers[s.slots[0]].view(np.float32)[mine] for s in results])
            value = value.astype(np.float32).view(np.uint32)
            for i, target in enumerate(targets):
                (slot,) = target.slots
                whole = block.registers[slot].copy()
                whole[mine] = value[i]
                locked = block.locked.pop(slot)
                block.put(slot, whole, mine)
                block.locked[slot] = locked

        block.keep(Products).open.setdefault(warp, []).append((slots, finish))
        for slot in slots:
            block.locked.setdefault(slot, set()).add(warp)

    return run


def check_fences(kernel: Kernel) -> None:
    """Between a wgmma.fence and the products after it, nothing else may write their registers (PTX ISA 9.7.15.7.1).

    Read off the text, where the compiler puts both into one straight piece of code.
    """
    jumps = [i.operands[0] for i in kernel.instructions if i.opcode[0] == "bra"]
    starts = {kernel.labels[label] for label in jumps}
    for at, instruction in enumerate(kernel.instructions):
        if instruction.opcode[:2] != ("wgmma", "mma_async"):
            continue
        used = set(split_operands(instruction.operands[0][1:-1]))
        if instruction.operands[1].startswith("{"):
            used |= set(split_operands(instruction.operands[1][1:-1]))
        for before in reversed(range(at)):
            earlier = kernel.instructions[before]
            if earlier.opcode[:2] == ("wgmma", "fence"):
                break
            if earlier.opcode[0] in ("bra", "ret") or before + 1 in starts:
                raise _unfenced(instruction)
            written = re.findall(r"%\w+", earlier.operands[0]) if earlier.operands else []
            if earlier.opcode[0] != "wgmma" and used.intersection(written):
                raise Misuse(
                    f"`{earlier.text}` writes a register between wgmma.fence and the product that uses it "
                    f"({instruction.source})"
                )
        else:
            raise _unfenced(instruction)


def _unfenced(instruction: Instruction) -> Misuse:
    return Misuse(f"no wgmma.fence before `{instruction.text[:80]}...` ({instruction.source})")
