"""The command ``ptx-check``: what is in a PTX file, a run of it, and broken forms of it."""

import argparse
import json
import math
import signal
import sys
from argparse import ArgumentTypeError
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ptx_check.bits import round_to_bfloat16
from ptx_check.check import check
from ptx_check.decode import Instruction
from ptx_check.errors import Misuse, OutOfBounds, PtxError, Race, Stuck, Uninitialised, UnknownInstruction
from ptx_check.launch import Argument
from ptx_check.mutate import Mutant, mutate
from ptx_check.scheduler import Trace
from ptx_check.table import NOTHING, Program, Step

KINDS = {
    "f16": np.float16, "bf16": np.uint16, "f32": np.float32, "f64": np.float64, "i8": np.int8, "u8": np.uint8,
    "i16": np.int16, "i32": np.int32, "u32": np.uint32, "i64": np.int64, "u64": np.uint64,
}  # fmt: skip
FOUND = (Race, OutOfBounds, Uninitialised, Stuck, Misuse, AssertionError)  # in a kernel that was understood
DESCRIPTION = """Runs PTX without a GPU, and checks it: races, missing barriers, bounds, values
that were never written.

  ptx-check add.ptx                                       what is in it
  ptx-check add.ptx --grid 2 --arg f32:200 --arg 200      run it
  ptx-check add.ptx --grid 2 --arg ... --mutate           run it without each
      barrier, wait, fence and bound in turn: is it noticed?

--arg, once for each parameter of the kernel, is a whole number, a number with
a point or an exponent, FILE.npy, or an array KIND:SIZExSIZE[=FILL], where KIND
is f16 bf16 f32 f64 i8 u8 i16 i32 u32 i64 or u64. Without FILL, floats are
random and integers 0. The pointers that Triton adds at the end need no --arg.

The exit code is 0 where nothing was found, 1 where something was, and 2 where
the command or the PTX was not understood."""


def array(text: str, random: np.random.Generator) -> np.ndarray:
    """An array from KIND:SIZExSIZE[=FILL].

    >>> array("i32:2x3=7", np.random.default_rng(0)).tolist()
    [[7, 7, 7], [7, 7, 7]]
    """
    kind, _, rest = text.partition(":")
    size, _, fill = rest.partition("=")
    shape = [int(n) for n in size.split("x")]
    dtype = np.dtype(KINDS[kind])
    floats = kind == "bf16" or dtype.kind == "f"
    value = (
        (np.full(shape, float(fill)) if floats else np.full(shape, int(fill), dtype))
        if fill
        else (random.standard_normal(shape) if floats else np.zeros(shape, dtype))
    )
    return round_to_bfloat16(value) if kind == "bf16" else value.astype(dtype)


def argument(text: str, random: np.random.Generator) -> Argument:
    """What ``--arg`` says."""
    try:
        if text.endswith(".npy"):
            return np.load(text)
        if ":" in text:
            return array(text, random)
        return int(text, 0) if text.lstrip("-").isalnum() and text[-1].isdigit() else float(text)
    except MemoryError:
        raise ArgumentTypeError(f"--arg {text} is larger than the memory here") from None
    except (KeyError, ValueError, OSError, EOFError, OverflowError) as error:
        raise ArgumentTypeError(
            f"--arg {text} is no number, no FILE.npy and no array such as f32:7x200 or i32:64=1 ({error})"
        ) from None


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.strip().isdigit() or int(text) < 1:
        raise ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def programs(text: str) -> list[int]:
    """What ``--grid`` says."""
    return [positive(part) for part in text.split(",")]


def shared_bytes(file: Path) -> int:
    """What NAME.json beside NAME.ptx says, as in Triton's cache; 0 where there is none."""
    beside = file.with_suffix(".json")
    try:
        return int(json.loads(beside.read_text(encoding="utf-8")).get("shared", 0)) if beside.is_file() else 0
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{beside} does not say the bytes of shared memory ({error}): give --shared") from error


class Read(Program):
    """A kernel of which unknown instructions are noted instead of refused."""

    def __init__(self, ptx: str):
        self.unknown: list[Instruction] = []
        super().__init__(ptx)

    def _step(self, instruction: Instruction) -> Step:
        try:
            return super()._step(instruction)
        except UnknownInstruction:
            self.unknown.append(instruction)
            return super()._step(NOTHING)


def describe(ptx: str) -> int:
    """Say what is in a kernel; 2 where some of it cannot be run."""
    read = Read(ptx)
    kernel = read.kernel
    print(f"{kernel.name}: {kernel.threads} threads, {len(kernel.instructions)} instructions")
    for number, (name, (_, size)) in enumerate(kernel.parameters.items()):
        print(f"  parameter {number}: {size} bytes, {name}")
    for instruction in read.unknown:
        print(f"  cannot be run: {instruction.text} {instruction.source}".rstrip())
    if not read.unknown:
        print("  all of it can be run: give --grid, and an --arg for each parameter")
    return 2 if read.unknown else 0


def summary(found: Sequence[Mutant]) -> str:
    """How the broken forms of a kernel were noticed, and which were not."""
    count = Counter(mutant.noticed for mutant in found)
    lines = [
        f"{len(found)} broken kernels: {count['error']} noticed by a check, {count['wrong']} by the result, "
        f"{count['redundant']} redundant, {count['']} not noticed"
    ]
    lines += [
        f"  not noticed: {m.kind} at {m.at}, {m.instruction.text} {m.instruction.source}".rstrip()
        for m in found
        if not m.noticed
    ]
    return "\n".join(lines)


def same(x: np.ndarray, y: np.ndarray) -> bool:
    return x.tobytes() == y.tobytes()


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ptx-check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE.ptx", help="PTX with one kernel")
    parser.add_argument("--grid", type=programs, help="programs (blocks): X, X,Y or X,Y,Z; without it nothing is run")
    parser.add_argument("--arg", action="append", default=[], metavar="VALUE", help="see above")
    parser.add_argument("--shared", type=int, help="bytes of dynamic shared memory; default: NAME.json beside the file")
    parser.add_argument("--schedules", type=positive, default=4, help="how many; the first is programs in order")
    parser.add_argument("--mutate", action="store_true", help="then break the kernel, one instruction at a time")
    parser.add_argument("--trace", action="store_true", help="print every instruction of the first schedule")
    options = parser.parse_args(given)
    if not options.file.is_file():
        parser.error(f"{options.file} is no file")
    for name, value in (("--arg", options.arg), ("--mutate", options.mutate), ("--trace", options.trace)):
        if value and options.grid is None:
            parser.error(f"{name} runs the kernel: give --grid, the number of programs, too")
    try:
        ptx = options.file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        parser.error(f"{options.file} is no PTX, which is text: {error}")
    try:
        if options.grid is None:
            return describe(ptx)
        random = np.random.default_rng(0)
        try:
            arguments = [argument(text, random) for text in options.arg]
        except ArgumentTypeError as error:
            parser.error(str(error))
        before = [a.copy() if isinstance(a, np.ndarray) else a for a in arguments]
        how = {
            "grid": options.grid,
            "shared_bytes": shared_bytes(options.file) if options.shared is None else options.shared,
        }
        if options.trace:
            check(ptx, arguments=arguments, seeds=(None,), trace=Trace(), **how)
            return 0
        seeds = (None, *range(1, options.schedules))
        steps = check(ptx, arguments=arguments, seeds=seeds, **how)
        plural = "s" * (len(seeds) > 1)
        print(f"nothing found under {len(seeds)} schedule{plural}, in {steps} steps of groups of warps")
        pairs = [(n, old, new) for n, (old, new) in enumerate(zip(before, arguments, strict=True))]
        lines = [
            f"  argument {n}: {written(*of)}" for n, *of in pairs if isinstance(of[1], np.ndarray) and not same(*of)
        ]
        print("\n".join(lines or ["  no array was changed: are --grid and every --arg as in a real launch?"]))
        if not options.mutate:
            return 0

        def run(program: Program) -> None:
            copies = [a.copy() if isinstance(a, np.ndarray) else a for a in before]
            check(program, arguments=copies, seeds=(1,), **how)
            for number, (got, want) in enumerate(zip(copies, arguments, strict=True)):
                if isinstance(got, np.ndarray):
                    assert same(got, want), f"argument {number} holds other values"

        found = list(mutate(ptx, run))
        print(summary(found))
        return any(not mutant.noticed for mutant in found)
    except (PtxError, AssertionError, ValueError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1 if isinstance(error, FOUND) else 2


def written(old: np.ndarray, new: np.ndarray) -> str:
    """How much of an array changed, and whether NaN is left in it."""
    bits = f"u{new.dtype.itemsize}"
    changed = int((old.view(bits) != new.view(bits)).sum())
    left = int(np.isnan(new).sum()) if new.dtype.kind == "f" else 0
    return f"{changed} of {math.prod(new.shape)} elements changed" + (f", {left} are NaN" if left else "")


def command() -> None:
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `ptx-check ... --trace | head` ends without a traceback
    sys.exit(main())


if __name__ == "__main__":
    command()
