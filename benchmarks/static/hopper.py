"""What the attention kernel for sm_90 compiles to, and the limits it must keep.

    python -m benchmarks.static.hopper [--only REGEX] [--json]     # exits with 1 where a limit is broken
    python -m benchmarks.static.hopper --markdown                  # the table of docs/writing-kernels.md

The other kernels' figures come from `worker`; here are those that only a kernel has whose warps have tasks of their
own. Of each loop over keys: ``ntm`` (see `measure`), and how many exponentials stand between the wait for the scores
and the wait for the sums of values, which run meanwhile. A compiler that moves the second wait before them undoes what
the kernel is for, and no result shows it. ``threads_registers`` is what the program begins with, ``exchanged`` what its
warps have once they have given up and taken over registers: beyond 65,536 it compiles, and can never run.
"""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.static import sass
from benchmarks.static.case import broken_limits, empty, launch, some_positions
from benchmarks.static.measure import issued_per_mflop
from benchmarks.static.run import triton_version
from benchmarks.static.worker import compile_instead_of_launch
from orthorank_kernels.triton import configs
from orthorank_kernels.triton.hopper.launch import BLOCKS, PART

TARGET, REGISTERS = "sm_90", 65_536
# Of head_dim, filled up to a power of two: the prototype's figures with Triton 3.6, and a twentieth, for unmasked and
# masked loops.
NTM = {64: (918 * 1.05, 1158 * 1.05), 128: (494 * 1.05, 608 * 1.05), 256: (415 * 1.05, 481 * 1.05)}
# What an option adds was measured here; a window's figure is that of a masked loop, of which it has two in three.
OPTION_NTM = {
    "window": {64: (1500.0, 1520.0), 128: (780.0, 800.0), 256: (575.0, 590.0)},
    "soft": {64: (1610.0, 1875.0), 128: (840.0, 970.0), 256: (600.0, 680.0)},
}
# Before the loops and behind them, by head_dim and case; with Triton 3.6 and with newer ones.
SPILLS = {
    (64, "window and sinks"): (8, 0),
    (256, "pages of 16, window"): (10, 22),
}
EXPONENTIALS = {dim: PART * keys // 128 for dim, keys in BLOCKS.items()}  # of a thread in each loop: one for each score
LOOPS, WINDOW_LOOPS = 4, 6  # of two consumers: with a mask and without, and with the mask of a window behind them


def attention(
    dim: int,
    group: int,
    more: bool,
    window: int | None = None,
    softcap: float | None = None,
    interleaved: bool = False,
) -> Callable[[], Any]:
    """``more``: with left padding, the log-sum-exp, and queries that are turned. With a window: with sinks as well."""
    q = empty(2, 681, 8 * group, dim).transpose(1, 2)
    k = empty(2, 8, 2047, dim)
    starts = empty(2, dtype=torch.int32) if more else None
    tables = (empty(2, 2047, dim), empty(2, 2047, dim), interleaved, dim) if more else (None, None, False, None)
    sinks = None if window is None else empty(8 * group)
    options = (dim**-0.5, window, starts, 2047 - 681, softcap, sinks, more, *tables)
    return launch("attention.sparse_query_attention", q, k, k, some_positions(2, 681), *options)


def packed(dim: int) -> Callable[[], Any]:
    q, k, ends = empty(681, 32, dim), empty(30_001, 8, dim), empty(6, dtype=torch.int32)
    options = (None, dim**-0.5, None, None, None, False)
    positions = empty(681, dtype=torch.int32)
    return launch("attention.sparse_query_attention_varlen", q, k, k, positions, ends, ends, *options)


def paged(dim: int, page: int, window: int | None = None) -> Callable[[], Any]:
    q, cache, ends = empty(681, 32, dim), empty(999, page, 8, dim), empty(6, dtype=torch.int32)
    options = (None, None, dim**-0.5, window, None, None, None, None, False)
    positions, table = empty(681, dtype=torch.int32), empty(5, 99, dtype=torch.int32)
    return launch("attention.sparse_query_attention_paged", q, cache, cache, positions, ends, table, ends[1:], *options)


def split(dim: int) -> Callable[[], Any]:
    """Few queries over many keys."""
    q, k = empty(1, 100, 32, dim).transpose(1, 2), empty(1, 8, 30_000, dim)
    return launch("attention.sparse_query_attention", q, k, k, some_positions(1, 100), dim**-0.5, None, None, 29_000,
                  None, None, False)  # fmt: skip


CASES = {
    f"dim {dim}, {name}": (dim, case)
    for dim in BLOCKS
    for name, case in {
        "groups of 4": attention(dim, 4, False),
        "groups of 7, padding, rotary and log-sum-exp": attention(dim, 7, True),
        "rotary, interleaved": attention(dim, 4, True, interleaved=True),
        "packed": packed(dim),
        "pages of 16": paged(dim, 16),
        "pages of 256": paged(dim, 256),
        "pages of 16, window": paged(dim, 16, window=500),
        "split keys": split(dim),
        "window and sinks": attention(dim, 4, False, window=500),
        "soft-capping": attention(dim, 4, False, softcap=30.0),
    }.items()
    # Where zeros fill a head up, the loops are those of the next power of two: what threads load is another thing.
    if configs.next_power_of_2(dim) == dim or "rotary and" in name
}


def loops_of_all_warps(code: list[sass.Instruction]) -> Iterator[list[sass.Instruction]]:
    """Loops with products. Where a kernel branches by number nothing says where to: the parts that nothing else reaches
    are read from their first instruction, and may come to loops that were there before."""
    left, known = code, set()
    while any("MMA" in instruction.base for instruction in left):
        for loop in sass.matrix_loops(left):
            products = frozenset(i.address for i in loop if "MMA" in i.base)
            if products not in known:
                known.add(products)
                yield loop
        reached = set(sass._reverse_postorder(sass._successors(left)))
        left = left[next((i for i in range(len(left)) if i not in reached), len(left)) :]


def waits(loop: list[sass.Instruction]) -> tuple[int, int]:
    """Exponentials of a loop between the wait for all but one group of products and that for all, and elsewhere."""
    meanwhile = elsewhere = 0
    between = False
    for instruction in loop:
        if instruction.op.startswith("WARPGROUP.DEPBAR"):
            between = instruction.operands.split(",")[-1].strip() == "0x1"
        elif instruction.op.startswith("MUFU.EX2"):
            meanwhile += between
            elsewhere += not between
    return meanwhile, elsewhere


def measured(kernel: Any) -> dict[str, Any]:
    """A measurement of what ``triton.compile`` returned."""
    code = sass.disassemble(kernel.asm["cubin"])
    loops = list(loops_of_all_warps(code))
    between, elsewhere = zip(*map(waits, loops), strict=True)
    ntm = sorted(issued_per_mflop(loop) or 0.0 for loop in loops)
    warps = kernel.metadata.num_warps
    numbers = [int(n) for n in re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+)", kernel.asm["ptx"])]
    return {
        "warps": warps,
        "shared": kernel.metadata.shared,
        "spills": sass.count(code, sass.SPILLS),
        "loop_spills": sum(sass.count(loop, sass.SPILLS) for loop in loops),
        "threads_registers": sass.registers(kernel.asm["cubin"]) * warps * 32,
        "exchanged": 128 * (2 * sorted({n for n in numbers if n != 256})[-1] + min(numbers)),
        "loops": len(loops),
        "ntm": ntm[len(ntm) // 2 - 1],
        "ntm_masked": ntm[-1],
        "between": min(between),
        "elsewhere": max(elsewhere),
    }


def complaints(found: dict[str, Any], dim: int, name: str = "") -> list[str]:
    """Broken limits, in words."""
    loops = WINDOW_LOOPS if "window" in name else LOOPS
    of_option = next((value for option, value in OPTION_NTM.items() if option in name), NTM)
    ntm, masked = of_option[configs.next_power_of_2(dim)]
    with_36, spills = SPILLS.get((dim, name.partition(", ")[2]), (0, 0))
    spills = with_36 if triton_version().startswith("3.6.") else spills
    limits = {"spills": spills, "loop_spills": 0, "threads_registers": REGISTERS, "exchanged": REGISTERS,
              "loops": loops, "min_loops": loops, "ntm": ntm, "ntm_masked": masked,
              "min_between": EXPONENTIALS[dim], "elsewhere": 0}  # fmt: skip
    return broken_limits({"launches": 1, **found}, limits, TARGET)


def row(name: str, found: dict[str, Any]) -> str:
    """Of the documentation's table."""
    begin = found["threads_registers"] // found["warps"] // 32
    cells = (name, begin, found["spills"], f"{found['shared'] / 1024:.0f} KiB", f"{found['ntm']:.0f}",
             f"{found['ntm_masked']:.0f}", found["between"], found["elsewhere"])  # fmt: skip
    return f"| {' | '.join(map(str, cells))} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches")
    parser.add_argument("--json", action="store_true", help="one object for each case")
    parser.add_argument("--markdown", action="store_true", help="rows of a table")
    options = parser.parse_args()
    os.environ["ORTHORANK_ATTENTION"] = "hopper"
    compiled = compile_instead_of_launch(TARGET)
    broken = 0
    for name, (dim, case) in CASES.items():
        if not re.search(options.only, name):
            continue
        compiled.clear()
        case()
        found = measured(compiled[0])
        wrong = complaints(found, dim, name)
        broken += bool(wrong)
        if options.markdown:
            print(row(name, found), flush=True)
        elif options.json:
            print(json.dumps({"case": name, **found, "complaints": wrong}), flush=True)
        else:
            print(f"{name:<44}", "  ".join(f"{key} {value:.5g}" for key, value in found.items()), *wrong, flush=True)
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
