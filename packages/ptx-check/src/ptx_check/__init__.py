"""Runs PTX, what Triton compiles kernels to, on a machine without a GPU, and checks what a GPU would not report: races,
barriers that are missing, memory that was never written, accesses out of bounds.

The way through it:

    decode.py        text -> instructions        operands.py   an operand -> how to read or write it
    table.py         opcode -> what it does      ops_*.py      the entries of the table, one file for each kind
    clocks.py        what happened before what   shadow.py     who touched a byte last
    shared_memory.py, global_memory.py, mbarriers.py (tensor memory is in ops_tcgen05.py)
    block.py         a program instance: registers, warps, memory       scheduler.py   who runs next
    launch.py        runs one kernel             check.py      under several schedules
    mutate.py        breaks it on purpose        cli.py        the command
    snippet.py       a few instructions alone    exact.py      floating point with rational numbers
    samples.py       inputs for instructions
"""

from ptx_check.check import check
from ptx_check.errors import Misuse, OutOfBounds, PtxError, Race, Stuck, Uninitialised, UnknownInstruction
from ptx_check.launch import Descriptor
from ptx_check.mutate import Mutant, mutate
from ptx_check.table import Program

__all__ = [
    "Descriptor",
    "Misuse",
    "Mutant",
    "OutOfBounds",
    "Program",
    "PtxError",
    "Race",
    "Stuck",
    "Uninitialised",
    "UnknownInstruction",
    "check",
    "mutate",
]
