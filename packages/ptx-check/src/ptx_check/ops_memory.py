"""Loads, stores and atomics (PTX ISA 9.7.9, 9.7.13.13)."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx_check.bits import TYPES, raw
from ptx_check.decode import Instruction
from ptx_check.errors import Uninitialised
from ptx_check.operands import Operands
from ptx_check.table import Run, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block

SHARED = ("shared", "shared::cta")
VECTORS = {"v2": 2, "v4": 4, "v8": 8}
ORDERS = ("relaxed", "acquire", "release", "acq_rel")
SCOPES = ("cta", "gpu", "sys")


def _space(words: set[str], instruction: Instruction) -> str:
    spaces = {"shared" if word in SHARED else word for word in words & {*SHARED, "global", "param"}}
    if len(spaces) != 1:
        raise unknown(instruction)
    return spaces.pop()


@entry("ld")
def _load(instruction: Instruction, operands: Operands) -> Run:
    kind = instruction.opcode[-1]
    words = modifiers(instruction, kind, *SHARED, "global", "param", *VECTORS)
    space, count = _space(words, instruction), next((VECTORS[w] for w in words if w in VECTORS), 1)
    targets = operands.write_vector(instruction.operands[0], kind)
    address = operands.address(instruction.operands[1])
    dtype, size = TYPES[kind], TYPES[kind].itemsize * count
    if len(targets) != count or len(instruction.operands) != 2:
        raise unknown(instruction)

    def load_parameter(block: "Block", active: np.ndarray | None) -> None:
        offset = int(address.get(block)[0])
        value = np.frombuffer(block.parameters, dtype, 1, offset)
        targets[0].put(block, np.repeat(value, block.threads), active)

    def load(block: "Block", active: np.ndarray | None) -> None:
        lanes = block.lanes(active)
        where = block.value(address, active, "an address")[lanes]
        data = np.zeros((block.threads, size), np.uint8)
        if space == "global":
            data[lanes] = block.memory.load(block, where, size, lanes)
        else:
            data[lanes] = block.shared.load(block, where, size, lanes, parts=count)
        values = data.view(dtype)
        for i, target in enumerate(targets):
            target.put(block, np.ascontiguousarray(values[:, i]), active)
        if space == "global" or block.shared.undefined_at(where, size) is None:
            return
        for i, target in enumerate(targets):
            one = block.shared.undefined_at(where + i * dtype.itemsize, dtype.itemsize)
            if one is not None:
                every = np.zeros(block.threads, bool)
                every[lanes] = one
                for slot in target.slots:
                    block.mark_undefined(slot, every)

    return load_parameter if space == "param" else load


@entry("st")
def _store(instruction: Instruction, operands: Operands) -> Run:
    kind = instruction.opcode[-1]
    words = modifiers(instruction, kind, *SHARED, "global", *VECTORS)
    space, count = _space(words, instruction), next((VECTORS[w] for w in words if w in VECTORS), 1)
    address, values = operands.address(instruction.operands[0]), operands.vector(instruction.operands[1], kind)
    if len(values) != count or len(instruction.operands) != 2:
        raise unknown(instruction)
    slots = tuple(slot for value in values for slot in value.slots)

    def store(block: "Block", active: np.ndarray | None) -> None:
        lanes = block.lanes(active)
        where = block.value(address, active, "an address")[lanes]
        data = np.stack([raw(value.get(block)) for value in values], 1)[lanes].view(np.uint8)
        if space == "global":
            block.require(slots, active, "a store to global memory")
            block.memory.store(block, where, data, lanes)
        else:
            bad = block.undefined_in(slots, active)
            block.shared.store(block, where, data, lanes, undefined=None if bad is None else bad[lanes])

    return store


_UPDATE: dict[str, Callable[[int, int], int]] = {
    "add": lambda old, x: old + x,
    "min": min,
    "max": max,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "exch": lambda old, x: x,
}


@entry("atom", "red")
def _atomic(instruction: Instruction, operands: Operands) -> Run:
    """Lanes one after the other. Orders and scopes count between programs: see `global_memory`."""
    returns = instruction.opcode[0] == "atom"
    kind = instruction.opcode[-1]
    words = modifiers(instruction, kind, *SHARED, "global", *ORDERS, *SCOPES, *_UPDATE, "cas")
    space, order, scope = _space(words, instruction), words & {*ORDERS}, words & {*SCOPES}
    name = words & {*_UPDATE, "cas"}
    if len(name) != 1 or len(order) > 1 or len(scope) > 1 or kind not in ("u32", "s32", "b32", "u64", "s64", "b64"):
        raise unknown(instruction)
    (name,), order, scope = name, order.pop() if order else "relaxed", scope.pop() if scope else "gpu"
    first = 1 if returns else 0
    address = operands.address(instruction.operands[first])
    values = [operands.read(text, kind) for text in instruction.operands[first + 1 :]]
    if len(values) != (2 if name == "cas" else 1):
        raise unknown(instruction)
    slots = tuple(slot for value in values for slot in value.slots)
    target = operands.write(instruction.operands[0], kind) if returns else None
    dtype = TYPES[kind]

    def run(block: "Block", active: np.ndarray | None) -> None:
        lanes = block.lanes(active)
        where = block.value(address, active, "an address")[lanes]
        block.require(slots, active, "an atomic")
        memory = block.memory if space == "global" else block.shared
        if space == "shared" and block.shared.undefined_at(where, dtype.itemsize) is not None:
            raise Uninitialised("an atomic depends on undefined bytes of shared memory")
        old = memory.load(block, where, dtype.itemsize, lanes, atomic=True).view(dtype)[:, 0]
        before, after = update_in_turn(name, where, old, [value.get(block)[lanes] for value in values])
        memory.store(block, where, after[:, None].view(np.uint8), lanes, atomic=True)
        if space == "global" and scope != "cta":
            for lane, at in zip(lanes.tolist(), where.tolist(), strict=True):
                block.memory.synchronise(
                    block, at, lane // 32, order in ("release", "acq_rel"), order in ("acquire", "acq_rel")
                )
        if target is not None:
            result = np.zeros(block.threads, dtype)
            result[lanes] = before
            target.put(block, result, active)

    return run


def update_in_turn(
    name: str, where: np.ndarray, old: np.ndarray, values: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """What each lane finds and, for all lanes of a word, what is left there at the end."""
    if name == "add":  # the one that histograms use: without a loop
        order = np.argsort(where, kind="stable")
        sums = np.cumsum(values[0][order], dtype=old.dtype)
        starts = np.flatnonzero(np.diff(where[order], prepend=where[order][:1] + np.uint64(1)))
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(where)))
        earlier = np.concatenate([np.zeros(1, old.dtype), sums])[starts][group]
        ends = sums[np.append(starts[1:], len(where)) - 1][group]
        before, after = np.empty_like(old), np.empty_like(old)
        before[order] = old[order] + sums - earlier - values[0][order]
        after[order] = old[order] + ends - earlier
        return before, after
    words = {int(at): int(now) for at, now in zip(where, old, strict=True)}
    before = np.empty_like(old)
    for i, at in enumerate(where.tolist()):
        before[i] = words[at]
        if name == "cas":
            words[at] = int(values[1][i]) if words[at] == int(values[0][i]) else words[at]
        else:
            words[at] = _UPDATE[name](words[at], int(values[0][i]))
    return before, np.array([words[at] for at in where.tolist()], old.dtype)
