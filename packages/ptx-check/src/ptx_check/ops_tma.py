"""mbarrier instructions (PTX ISA 9.7.13.15), tensor copies to shared memory (9.7.9.27: cp.async.bulk.tensor), and the
fence between the ordinary and the asynchronous proxy (9.7.13.4).
"""

from typing import TYPE_CHECKING

import numpy as np

from ptx_check import shadow
from ptx_check.bits import WARP
from ptx_check.decode import Instruction, split_operands
from ptx_check.errors import Misuse, OutOfBounds
from ptx_check.mbarriers import Mbarriers
from ptx_check.operands import Operands
from ptx_check.table import Run, entry, modifiers, unknown

if TYPE_CHECKING:
    from ptx_check.block import Block
    from ptx_check.launch import Descriptor

SWIZZLE_MASK = {0: 0, 32: 1, 64: 3, 128: 7}  # of the 128-byte lines, which are exchanged within 16-byte chunks


def swizzle(address: np.ndarray, width: int) -> np.ndarray:
    """Where the byte that would be at ``address`` is, with a swizzle of ``width`` bytes (PTX ISA 5.5.5)."""
    return address ^ (((address >> 7) & SWIZZLE_MASK[width]) << 4)


@entry("mbarrier")
def _mbarrier(instruction: Instruction, operands: Operands) -> Run:
    action = instruction.opcode[1]
    words = modifiers(instruction, action, "parity", "expect_tx", "shared::cta", "shared", "b64")
    texts = list(instruction.operands)
    if action in ("try_wait", "test_wait") and "parity" in words:
        return _wait(instruction, operands)
    if action == "arrive" and texts.pop(0) != "_":
        raise unknown(instruction)
    if action not in ("init", "inval", "arrive"):
        raise unknown(instruction)
    address = operands.address(texts[0])
    number = operands.read(texts[1], "u32") if len(texts) > 1 else None

    def run(block: "Block", active: np.ndarray | None) -> None:
        where = block.value(address, active, "an address")
        counts = block.value(number, active, "a count") if number is not None else np.ones(block.threads, np.uint32)
        barriers = block.keep(Mbarriers)
        for lane in block.lanes(active).tolist():
            at, count = int(where[lane]), int(counts[lane])
            if action == "init":
                block.shared.store(
                    block, where[[lane]], np.zeros((1, 8), np.uint8), np.array([lane])
                )  # its state; the bytes mean nothing here, but who wrote them does
                barriers.initialise(block, at, count)
            elif action == "inval":
                barriers.invalidate(block, at, lane // WARP)
            elif "expect_tx" in words:
                barriers.arrive(block, at, lane // WARP, 1, count)
            else:
                barriers.arrive(block, at, lane // WARP, count, 0)

    return run


def _wait(instruction: Instruction, operands: Operands) -> Run:
    """One look at the barrier, for each warp. The scheduler lets others run before a warp looks again."""
    done = operands.write(instruction.operands[0], "pred")
    address, parity = operands.address(instruction.operands[1]), operands.read(instruction.operands[2], "u32")

    def run(block: "Block", active: np.ndarray | None) -> None:
        where, wanted = block.value(address, active, "an address"), block.value(parity, active, "a parity")
        result = np.zeros(block.threads, bool)
        lanes = block.lanes(active)
        for warp in block.active_warps(active):
            mine = lanes[lanes // WARP == warp]
            if len(set(zip(where[mine].tolist(), wanted[mine].tolist(), strict=True))) != 1:
                raise Misuse("lanes of one warp wait for different mbarriers")
            at, one = int(where[mine[0]]), int(wanted[mine[0]]) & 1
            result[mine] = block.keep(Mbarriers).wait(block, at, warp, one)
        done.put(block, result, active)

    return run


@entry("fence")
def _fence(instruction: Instruction, operands: Operands) -> Run:
    """Only the proxy fence is known: order between programs needs atomics with a release and an acquire here."""
    if instruction.opcode[1:] not in (("proxy", "async", "shared::cta"), ("proxy", "async")):
        raise unknown(instruction)

    def run(block: "Block", active: np.ndarray | None) -> None:
        for warp in block.active_warps(active):
            block.clocks.fence_proxy(warp)

    return run


def load_tensor(instruction: Instruction, operands: Operands) -> Run:
    """A box of a tensor, from global to shared memory, completing on an mbarrier. Outside the tensor are zeros."""
    words = modifiers(
        instruction, "async", "bulk", "tensor", "1d", "2d", "3d", "4d", "5d", "shared::cta", "shared::cluster",
        "global", "mbarrier::complete_tx::bytes",
    )  # fmt: skip
    rank = next(int(w[0]) for w in words if w[1:] == "d")
    target, barrier = operands.address(instruction.operands[0]), operands.address(instruction.operands[2])
    tensor, coordinates = split_operands(instruction.operands[1].strip("[] "))
    descriptor = operands.read(tensor, "u64")
    places = operands.vector(coordinates, "s32")
    if len(places) != rank or "global" not in words:
        raise unknown(instruction)
    slots = (*descriptor.slots, *(slot for place in places for slot in place.slots))

    def run(block: "Block", active: np.ndarray | None) -> None:
        block.require(slots, active, "a tensor copy")
        where, at = block.value(target, active, "an address"), block.value(barrier, active, "an address")
        for lane in block.lanes(active).tolist():
            tensor = block.descriptors[int(descriptor.get(block)[lane])]
            first = tuple(int(place.get(block)[lane]) for place in places)
            _start(block, tensor, first, int(where[lane]), int(at[lane]), lane // WARP)

    return run


def _start(block: "Block", tensor: "Descriptor", first: tuple[int, ...], target: int, at: int, warp: int) -> None:
    """Note the copy: its bytes may not be touched until it has arrived, which somebody must wait for."""
    if len(first) != len(tensor.box):
        raise Misuse("the copy has not the rank of its tensor")
    if target % 128:
        raise OutOfBounds(f"a tensor copy to byte {target} of shared memory: not a multiple of 128")
    count = int(np.prod(tensor.box)) * tensor.element_bytes
    line = np.arange(target, target + count)
    if target + count > block.shared.size:
        raise OutOfBounds(f"a tensor copy to bytes {target} to {target + count} of {block.shared.size} shared ones")
    index = swizzle(line, tensor.swizzle_bytes)
    barrier = block.keep(Mbarriers).find(block, at, warp)
    block.shared.check_async_write(block, index, warp)
    block.shared.in_flight[index] = True
    pc = block.pc

    def arrive() -> None:
        block.shared.in_flight[index] = False
        block.shared.data[index] = box_bytes(block, tensor, first, warp)
        block.shared.written[index] = True
        block.clocks.now += 1
        time = block.clocks.now
        block.shared.writes[index] = shadow.stamp(barrier.agent, shadow.SEVERAL_LANES, False, pc, time)
        barrier.known[0, barrier.agent] = time
        barrier.bytes -= count

    barrier.in_flight.append(arrive)


def box_bytes(block: "Block", tensor: "Descriptor", first: tuple[int, ...], warp: int) -> np.ndarray:
    """The bytes of a box, innermost dimension first; zeros where it lies outside of the tensor."""
    offset, inside = np.zeros(1, np.int64), np.ones(1, bool)
    for start, size, stride, extent in zip(first, tensor.box, tensor.strides, tensor.shape, strict=True):
        place = start + np.arange(size)
        offset = (offset[None, :] + (place * stride)[:, None]).reshape(-1)
        inside = (inside[None, :] & ((place >= 0) & (place < extent))[:, None]).reshape(-1)
    data = np.zeros((len(offset), tensor.element_bytes), np.uint8)
    address = (tensor.address + offset[inside]).astype(np.uint64)
    bytes_of = address[:, None] + np.arange(tensor.element_bytes, dtype=np.uint64)
    data[inside] = block.memory.read_bytes(block, bytes_of.reshape(-1), warp).reshape(-1, tensor.element_bytes)
    return data.reshape(-1)
