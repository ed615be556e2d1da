"""Runs one kernel under several schedules with every check on."""

from collections.abc import Sequence

import numpy as np

from ptx_check.launch import Argument, launch
from ptx_check.scheduler import Trace
from ptx_check.table import Program

SEEDS = (None, 1, 2, 3)


def check(
    kernel: str | Program,
    grid: Sequence[int],
    arguments: Sequence[Argument],
    *,
    shared_bytes: int = 0,
    seeds: Sequence[int | None] = SEEDS,
    resident: int = 3,
    trace: Trace | None = None,
) -> int:
    """Run a kernel under each schedule, from the same arguments each time. Arrays hold what the last run wrote.

    Whether there is a race does not depend on the schedule; what the kernel computes may, and which of two faults is
    met first.

    Args:
        kernel: PTX with one kernel, as Triton has it in ``kernel.asm["ptx"]``, or a `Program` made of it.
        grid: one to three numbers of programs (blocks).
        arguments: in the order of the kernel's parameters: contiguous arrays for pointers, which are written in place
            (bfloat16 as the uint16 of its bits), numbers, and a `Descriptor` for a tensor map. The pointers that Triton
            adds at the end may be left out; they are 0.
        shared_bytes: dynamic shared memory of a program, ``kernel.metadata.shared`` of Triton.
        seeds: a schedule each; None runs programs in order and their warps together.
        resident: how many programs run at a time.
        trace: prints every instruction.

    Returns:
        Steps (instructions of groups of warps) of all runs.

    Raises:
        PtxError: as one of its kinds: Race, OutOfBounds, Uninitialised, Stuck, Misuse, or UnknownInstruction for what
            this package does not run.
        ValueError: an argument cannot be passed.

    Example:
        >>> ptx = '''.visible .entry twice(.param .u64 x) .reqntid 32 {
        ...   .reg .b32 %r<4>; .reg .b64 %rd<4>; ld.param.b64 %rd1, [x]; mov.u32 %r1, %tid.x;
        ...   mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2;
        ...   ld.global.b32 %r2, [%rd3]; add.s32 %r2, %r2, %r2; st.global.b32 [%rd3], %r2; ret; }'''
        >>> x = np.arange(32, dtype=np.int32)
        >>> check(ptx, (1,), [x])
        32
        >>> x[:4].tolist()
        [0, 2, 4, 6]
        >>> check(ptx, (1,), [x[:30].copy()])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ptx_check.errors.OutOfBounds: an access of 4 bytes to byte 120 of the storage of argument 0, ...
    """
    if not isinstance(kernel, str | Program):
        raise ValueError(f"kernel is {type(kernel).__name__}; it must be the text of a PTX file, or a Program")
    program = kernel if isinstance(kernel, Program) else Program(kernel)
    for number, argument in enumerate(arguments):
        if isinstance(argument, np.ndarray) and not argument.flags.writeable:
            raise ValueError(f"argument {number} is read-only, and kernels may write to it: pass a copy")
    before = [argument.copy() if isinstance(argument, np.ndarray) else None for argument in arguments]
    steps = 0
    for seed in seeds:
        for argument, value in zip(arguments, before, strict=True):
            if value is not None:
                argument[...] = value
        steps += launch(program, grid, arguments, shared_bytes=shared_bytes, seed=seed, resident=resident, trace=trace)
    return steps
