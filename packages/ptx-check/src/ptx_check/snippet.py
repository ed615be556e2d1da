"""Runs a few instructions by themselves: registers in, registers out. For the tests of the table."""

import random
from collections.abc import Mapping
from typing import Any

import numpy as np

from ptx_check import instructions  # noqa: F401  (fills the table)
from ptx_check.bits import raw
from ptx_check.block import Block
from ptx_check.global_memory import GlobalMemory
from ptx_check.mbarriers import Mbarriers
from ptx_check.ops_wgmma import check_fences
from ptx_check.scheduler import BlockRun
from ptx_check.table import Program

HEAD = """
.version 9.0
.target sm_90a
.address_size 64
.visible .entry snippet(.param .u64 first, .param .align 64 .b8 second[128])
.reqntid {threads}
{{
    .reg .pred %p<64>;
    .reg .b16 %rs<64>;
    .reg .b32 %r<600>;
    .reg .b64 %rd<64>;
{body}
    ret;
}}
"""


RUN: set[str] = set()  # the forms of all snippets of this process: see `test_emitted`


class Snippet:
    """The block after it ran; ``["%r1"]`` is a register of every thread, as unsigned bits."""

    def __init__(self, block: Block):
        self.block = block

    def __getitem__(self, name: str) -> np.ndarray:
        return self.block.registers[self.block.program.operands.slots[name]]

    def floats(self, name: str) -> np.ndarray:
        return self[name].view(np.float32)

    def undefined(self, name: str) -> np.ndarray:
        slot = self.block.program.operands.slots[name]
        return self.block.undefined.get(slot, np.zeros(self.block.threads, np.uint8)) != 0


def make(
    body: str,
    registers: Mapping[str, Any] | None = None,
    *,
    threads: int = 32,
    shared: Any = 0,
    memory: GlobalMemory | None = None,
    parameters: bytes = bytes(192),
    descriptors: Mapping[int, Any] | None = None,
    seed: int | None = None,
    index: int = 0,
    position: tuple[int, int, int] = (0, 0, 0),
) -> Block:
    """A block ready to run ``body``.

    Args:
        registers: by name; a value of every thread, or one for all. Its bits are taken.
        shared: bytes of shared memory, as a number (never written) or an array (written before the start).
    """
    program = Program(HEAD.format(threads=threads, body=body))
    for name in registers or {}:
        program.operands.slot(name)
    RUN.update(".".join(instruction.opcode) for instruction in program.kernel.instructions)
    check_fences(program.kernel)
    filled = isinstance(shared, np.ndarray)
    block = Block(
        program,
        index,
        position,
        (4, 3, 2),
        shared.nbytes if filled else shared,
        memory or GlobalMemory(),
        parameters,
        dict(descriptors or {}),
        None if seed is None else random.Random(seed),
    )
    if filled:
        block.shared.data[:] = shared.reshape(-1).view(np.uint8)
        block.shared.written[:] = True
    for name, value in (registers or {}).items():
        slot = program.operands.slot(name)
        kind = program.operands.types[slot]
        value = np.asarray(value)
        if value.dtype.kind in "iu" and value.dtype.itemsize != kind.itemsize:
            value = value.astype(kind)
        bits = raw(np.ascontiguousarray(np.broadcast_to(value, threads)))
        block.registers[slot] = bits.astype(kind)
        block.undefined.pop(slot, None)
    return block


def run(body: str, registers: Mapping[str, Any] | None = None, **options: Any) -> Snippet:
    """Run ``body`` in one block; the options are those of `make`."""
    block = make(body, registers, **options)
    finish(block)
    return Snippet(block)


def finish(block: Block) -> None:
    """Run a block to its end."""
    blocks = BlockRun(block)
    with np.errstate(all="ignore"):
        while not blocks.done:
            blocks.advance()
    block.keep(Mbarriers).check_finished()
