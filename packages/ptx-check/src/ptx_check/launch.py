"""Runs one kernel: binds arguments, makes the programs of the grid, lets the scheduler run them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ptx_check import instructions  # noqa: F401  (fills the table)
from ptx_check.block import Block
from ptx_check.errors import PtxError
from ptx_check.global_memory import GlobalMemory
from ptx_check.ops_wgmma import check_fences
from ptx_check.scheduler import Trace, run_all
from ptx_check.table import Program


@dataclass(frozen=True)
class Descriptor:
    """A tensor map (PTX ISA 5.5): what TMA needs to know of a tensor. Sizes from the innermost dimension on."""

    address: int
    shape: tuple[int, ...]  # elements
    strides: tuple[int, ...]  # bytes; the first is the element's size
    box: tuple[int, ...]  # elements
    element_bytes: int
    swizzle_bytes: int  # 0, 32, 64 or 128


Argument = np.ndarray | int | float | Descriptor


def launch(
    program: Program,
    grid: Sequence[int],
    arguments: Sequence[Argument],
    *,
    shared_bytes: int = 0,
    memory: GlobalMemory | None = None,
    seed: int | None = None,
    resident: int = 1,
    trace: Trace | None = None,
) -> int:
    """Run a kernel on a grid. Returns the number of steps (instructions of groups of warps).

    Args:
        arguments: in the order of the parameters; arrays are passed as pointers. Pointers missing at the end are 0.
        memory: where pointers among the arguments point to; arrays are added to it.
        seed: None runs programs in order and warps together; a number draws who runs next.
        resident: programs that run at the same time.
    """
    check_fences(program.kernel)
    if not isinstance(grid, Sequence) or not 1 <= len(grid) <= 3 or min(grid) < 1:
        raise ValueError(f"grid is {grid!r}; it must be one to three numbers of at least 1, such as (3,)")
    memory = memory or GlobalMemory()
    parameters, descriptors = _bind(program, arguments, memory)
    size = (*grid, 1, 1)[:3]
    places = [(x, y, z) for z in range(size[2]) for y in range(size[1]) for x in range(size[0])]
    source = None
    if seed is not None:
        source = random.Random(seed)
        source.shuffle(places)

    def blocks() -> Iterator[Block]:
        for index, place in enumerate(places):
            yield Block(program, index, place, size, shared_bytes, memory, parameters, descriptors, source)

    return run_all(blocks(), resident, source, trace)


def _bind(program: Program, arguments: Sequence[Argument], memory: GlobalMemory) -> tuple[bytes, dict[int, Descriptor]]:
    """The bytes of the parameters, and the descriptors by their offset there."""
    places = list(program.kernel.parameters.values())
    if len(arguments) > len(places):
        raise PtxError(f"the kernel has {len(places)} parameters and was given {len(arguments)}")
    for number in range(len(arguments), len(places)):
        if places[number][1] != 8:
            raise ValueError(
                f"{len(arguments)} arguments were given, and parameter {number} has {places[number][1]} bytes: only "
                "pointers at the end, which Triton adds, may be left out"
            )
    out, descriptors = bytearray(program.kernel.parameter_bytes), {}
    types = program.kernel.parameter_types
    for number, ((offset, size), argument) in enumerate(zip(places, arguments, strict=False)):
        if isinstance(argument, Descriptor):
            descriptors[offset] = argument
            continue
        if isinstance(argument, np.ndarray):
            if not argument.flags.c_contiguous or size != 8:
                raise ValueError(
                    f"argument {number} is an array and parameter {number} has {size} bytes: a pointer has 8"
                    if size != 8
                    else f"argument {number} has strides {argument.strides}: pass a contiguous array of what lies there"
                )
            data = argument.reshape(-1).view(np.uint8)
            argument = memory.add(f"argument {number}", data, np.ones(data.size, bool))
        if not isinstance(argument, int | float | np.number):
            cure = ": pass x.numpy()" if hasattr(argument, "numpy") else ""
            raise ValueError(
                f"argument {number} is a {type(argument).__name__}; it must be a NumPy array, a number or a "
                f"Descriptor{cure}"
            )
        if types[number] == "f":
            argument = float(argument)
        if isinstance(argument, float | np.floating):
            if types[number] in "us":
                raise ValueError(f"argument {number} is {argument}; parameter {number} is a whole number: pass an int")
            value = np.float64(argument) if size == 8 else np.float32(argument)
            out[offset : offset + size] = value.tobytes()
        else:
            out[offset : offset + size] = int(argument % (1 << 8 * size)).to_bytes(size, "little")
    return bytes(out), descriptors
