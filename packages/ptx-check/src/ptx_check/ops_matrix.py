"""Matrix products of a warp and the loads that feed them (PTX ISA 9.7.14.5: mma, ldmatrix, stmatrix).

The tables say which element of the matrix a lane's register holds; products are exact and summed in float64, then
rounded once, where a GPU rounds in an order of its own.
"""

from typing import TYPE_CHECKING

import numpy as np

from ptx_check.bits import WARP, halves
from ptx_check.decode import Instruction
from ptx_check.operands import Operands
from ptx_check.table import Run, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block

LANE = np.arange(WARP)
GROUP, IN_GROUP = LANE >> 2, LANE & 3
# m16n8k16, by [register, lane, half]: row and column of A; depth and column of B; [register, lane] of C and D.
_I, _J = np.arange(4)[:, None, None], np.arange(2)[None, None, :]
A_ROW = GROUP[None, :, None] + 8 * (_I & 1) + 0 * _J
A_COLUMN = 2 * IN_GROUP[None, :, None] + _J + 8 * (_I >> 1)
B_DEPTH = 2 * IN_GROUP[None, :, None] + _J + 8 * _I[:2]
B_COLUMN = GROUP[None, :, None] + 0 * B_DEPTH
C_ROW = GROUP[None, :] + 8 * (np.arange(4)[:, None] >> 1)
C_COLUMN = 2 * IN_GROUP[None, :] + (np.arange(4)[:, None] & 1)
COUNTS = {"x1": 1, "x2": 2, "x4": 4}


def fragments(block: "Block", sources: list, kind: str, warps: list[int]) -> np.ndarray:
    """[warps, registers, 32, 2] float32 from registers of packed pairs."""
    values = np.stack([source.get(block).reshape(-1, WARP)[warps] for source in sources], 1)
    return halves(values.reshape(-1), kind).reshape(*values.shape, 2)


@entry("mma")
def _multiply(instruction: Instruction, operands: Operands) -> Run:
    kind = instruction.opcode[-2]
    if kind not in ("f16", "bf16"):
        raise unknown(instruction)
    known = ("sync", "aligned", "m16n8k16", "row", "col", "f32", kind)
    if instruction.opcode[1:] != (*known, kind, "f32"):
        raise unknown(instruction)
    targets = operands.write_vector(instruction.operands[0], "f32")
    a, b = (operands.vector(text, "b32") for text in instruction.operands[1:3])
    c = operands.vector(instruction.operands[3], "f32")
    slots = tuple(slot for source in (*a, *b, *c) for slot in source.slots)

    def run(block: "Block", active: np.ndarray | None) -> None:
        block.require(slots, active, "a matrix product")
        warps = block.active_warps(active)
        left, right = np.zeros((len(warps), 16, 16)), np.zeros((len(warps), 16, 8))
        left[:, A_ROW, A_COLUMN] = fragments(block, a, kind, warps)
        right[:, B_DEPTH, B_COLUMN] = fragments(block, b, kind, warps)
        total = np.zeros((len(warps), 16, 8))
        total[:, C_ROW, C_COLUMN] = np.stack([source.get(block).reshape(-1, WARP)[warps] for source in c], 1)
        result = (left @ right + total).astype(np.float32)[:, C_ROW, C_COLUMN]
        for i, target in enumerate(targets):
            value = np.zeros((block.warps, WARP), np.float32)
            value[warps] = result[:, i]
            target.put(block, value.reshape(-1), active)

    return run


def _rows(block: "Block", count: int, warps: list[int]) -> np.ndarray:
    """Threads that hold the row addresses of ``count`` matrices of 8 rows: [warps * 8 * count]."""
    return (np.array(warps)[:, None] * WARP + np.arange(8 * count)).reshape(-1)


@entry("ldmatrix")
def _load_matrix(instruction: Instruction, operands: Operands) -> Run:
    """Lane 8 * i + r gives the address of row r of matrix i; lane l gets elements 2 * (l % 4) and + 1 of row l // 4."""
    words = modifiers(instruction, "sync", "aligned", "m8n8", "shared", "b16", "trans", *COUNTS)
    count = next(COUNTS[w] for w in words if w in COUNTS)
    targets = operands.write_vector(instruction.operands[0], "b32")
    address = operands.address(instruction.operands[1])
    if len(targets) != count:
        raise unknown(instruction)

    def run(block: "Block", active: np.ndarray | None) -> None:
        warps = block.active_warps(active)
        threads = _rows(block, count, warps)
        where = _addresses(block, address, threads, active)
        data = block.shared.load(block, where, 16, threads)
        matrices = data.view(np.uint16).reshape(len(warps), count, 8, 8)
        if "trans" in words:
            matrices = matrices.swapaxes(2, 3)
        pairs = np.stack([matrices[:, :, GROUP, 2 * IN_GROUP], matrices[:, :, GROUP, 2 * IN_GROUP + 1]], -1)
        values = np.ascontiguousarray(pairs).view(np.uint32)[..., 0]  # [warps, count, 32]
        for i, target in enumerate(targets):
            value = np.zeros((block.warps, WARP), np.uint32)
            value[warps] = values[:, i]
            target.put(block, value.reshape(-1), active)
        rows = block.shared.undefined_at(where, 16)
        if rows is not None:
            bad = np.repeat(rows.reshape(len(warps), count, 8, 1), 8, 3)
            bad = bad.swapaxes(2, 3) if "trans" in words else bad
            lanes = bad[:, :, GROUP, 2 * IN_GROUP] | bad[:, :, GROUP, 2 * IN_GROUP + 1]
            for i, target in enumerate(targets):
                every = np.zeros((block.warps, WARP), bool)
                every[warps] = lanes[:, i]
                block.mark_undefined(target.slots[0], every.reshape(-1))

    return run


@entry("stmatrix")
def _store_matrix(instruction: Instruction, operands: Operands) -> Run:
    """The reverse of ldmatrix."""
    words = modifiers(instruction, "sync", "aligned", "m8n8", "shared", "b16", "trans", *COUNTS)
    count = next(COUNTS[w] for w in words if w in COUNTS)
    address, sources = operands.address(instruction.operands[0]), operands.vector(instruction.operands[1], "b32")
    if len(sources) != count:
        raise unknown(instruction)

    def run(block: "Block", active: np.ndarray | None) -> None:
        warps = block.active_warps(active)
        threads = _rows(block, count, warps)
        where = _addresses(block, address, threads, active)
        values = np.stack([source.get(block).reshape(-1, WARP)[warps] for source in sources], 1)
        pairs = values.view(np.uint16).reshape(len(warps), count, WARP, 2)
        # A register that was never written makes the rows undefined to which it belongs.
        bad = [block.undefined_in(source.slots, active) for source in sources]
        missing = np.stack([np.zeros(block.threads, bool) if one is None else one for one in bad], 1)
        missing = np.moveaxis(missing.reshape(-1, WARP, count)[warps], 2, 1)
        matrices, undefined = np.zeros((2, len(warps), count, 8, 8), np.uint16)
        for half in range(2):
            matrices[:, :, GROUP, 2 * IN_GROUP + half] = pairs[..., half]
            undefined[:, :, GROUP, 2 * IN_GROUP + half] = missing
        if "trans" in words:
            matrices, undefined = matrices.swapaxes(2, 3), undefined.swapaxes(2, 3)
        data = np.ascontiguousarray(matrices).view(np.uint8).reshape(-1, 16)
        rows = undefined.any(3).reshape(-1) if undefined.any() else None
        block.shared.store(block, where, data, threads, undefined=rows)

    return run


def _addresses(block: "Block", address, threads: np.ndarray, active: np.ndarray | None) -> np.ndarray:
    """Of the lanes that give row addresses; the others' may be undefined."""
    giving = np.zeros(block.threads, bool)
    giving[threads] = True
    return block.value(address, giving if active is None else giving & active, "a row address")[threads]
