"""Breaks kernels on purpose, one instruction at a time, to see whether the checks notice.

    python -m tests.ptx.mutate sm_90 [--only REGEX] [--table]     # drop each barrier, wait, fence and bound
    python -m tests.ptx.mutate sm_90 --ordering                   # weaken the atomic of rms_norm_select

One JSON object per mutant on the standard output: case, kernel, kind, at, instruction, source, and how it was noticed:
error (the checks), wrong (another result), redundant (once others of which none is missed are gone), or none.
"""

import argparse
import itertools
import json
import linecache
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from ptx_check.decode import Instruction, decode
from ptx_check.errors import PtxError
from ptx_check.table import Program
from tests.ptx.case import Case
from tests.ptx.cases import CASES, cases_for
from tests.ptx.launchers import Settings
from tests.ptx.worker import RESIDENT, call, compare, prepare

# Titles of cases whose kernels are broken: each kernel, and what makes it take its other paths. After a title, those of
# cases with the same kernel and longer loops, which are asked about what the first does not notice.
MUTATED = {
    "gather_rows, hidden 200, bfloat16": (),
    "scatter_rows_, hidden 200, bfloat16": (),
    "gather_add_rms_norm, hidden 4096, several rows a program, bfloat16": (),
    "scatter_add_rows_, as in every_op: plain, bfloat16": (),
    "silu_and_mul, width 1100, bfloat16": (),
    "add_low_rank, hidden 200, rank 20, bfloat16": (),
    "apply_rotary_at, 2 heads of 80, 32 turned, float32": (),
    "rms_norm_score, own sink, several rows a program, bfloat16": (),
    "rms_norm_select, own sink, several rows a program, bfloat16": (),
    "rms_norm_select, packed, float32": (),
    "select_tokens, ragged, float32": (),
    "select_tokens, 9001 tokens, threshold, float32": (),
    "select_tokens, packed, float32": ("select_tokens, packed, 258 sequences, float32",),
    "sparse_query_attention, dim 64, one tile, bfloat16": (
        "sparse_query_attention, dim 64, one tile, more keys, bfloat16",
    ),
    "sparse_query_attention, dim 128, window and padding, float16": (
        "sparse_query_attention, dim 128, window and padding, more keys, float16",
    ),
    "sparse_query_attention, split keys, float32": (),
    "sparse_query_attention_paged, e5m2, bfloat16": (),
    "sparse_query_attention, hopper, dim 64, padding, bfloat16": (
        "sparse_query_attention, hopper, dim 64, many keys, bfloat16",
        "sparse_query_attention, hopper, dim 64, far apart, bfloat16",
    ),
}
ORDERED = "rms_norm_select, own sink, bfloat16"  # whose one atomic in global memory is weakened
DROPPED = {
    "barrier": r"bar\.(warp\.)?sync|barrier\.sync",
    "wait for copies": r"cp\.async\.wait_group",
    "wait for products": r"wgmma\.wait_group|tcgen05\.wait::st",
    "fence": r"fence\.proxy\.async|wgmma\.fence",
    "mbarrier": r"mbarrier\.(init|arrive)",
}
SEEDS = (1,)  # what the checks notice does not depend on the schedule
KERNELS = Path(__file__).resolve().parents[2] / "orthorank_kernels" / "triton"


def mutants(ptx: str) -> Iterator[tuple[str, int, Instruction | None]]:
    """(kind, index, replacement or None to drop) of each mutant of a kernel."""
    instructions = decode(ptx).instructions
    constant = {i.operands[0] for i in instructions if i.opcode == ("mov", "pred")}  # such a predicate is no bound
    for at, instruction in enumerate(instructions):
        opcode = ".".join(instruction.opcode)
        for kind, pattern in DROPPED.items():
            if re.match(pattern, opcode):
                yield kind, at, None
        if opcode.startswith("mbarrier.try_wait"):
            always = replace(instruction, opcode=("setp", "eq", "s32"), operands=(instruction.operands[0], "0", "0"))
            yield "wait for an mbarrier", at, always
        bounded = instruction.predicate and instruction.predicate not in constant
        if bounded and re.match(r"(ld|st)\.global|cp\.async\.c[ag]|atom", opcode):
            yield "bound", at, replace(instruction, predicate=None, negated=False)


def named(title: str) -> Case:
    (case,) = (c for c in CASES if c.title == title)
    return case


def outcome(cases: list[Case], settings: Settings, seeds: tuple[int | None, ...] = SEEDS) -> dict[str, str]:
    """What the first of these cases says of a kernel that finds something wrong; nothing when all is right."""
    for case, seed in itertools.product(cases, seeds):
        settings.seed, settings.resident = seed, RESIDENT
        try:
            compare(case, call(case, "triton"))
        except PtxError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        except AssertionError as error:
            return {"wrong": str(error)}
    return {}


def mutate(title: str, settings: Settings) -> Iterator[dict[str, Any]]:
    """Break what a case executes, one instruction of one of its kernels after the other."""
    cases = [named(title), *map(named, MUTATED[title])]
    unbroken: dict[str, Program] = {}
    settings.edit = lambda ptx: unbroken.setdefault(ptx, Program(ptx))
    settings.launches = []
    if found := outcome(cases, settings):
        raise AssertionError(f"{title} fails unbroken: {found}")
    kernels = {launch.ptx: launch.name for launch in settings.launches}
    for ptx, name in kernels.items():
        results = break_kernel(cases, settings, ptx, unbroken)
        for kind, at, how in results:
            instruction = unbroken[ptx].kernel.instructions[at]
            yield {
                "case": title,
                "kernel": name,
                "kind": kind,
                "at": at,
                "instruction": instruction.text[:100],
                "source": instruction.source,
                "line": line_of(instruction.source),
                **how,
            }
    settings.edit = None


def line_of(source: str) -> str:
    """The line of a kernel's source that "scoring.py:91" names; empty if it is not one of this package."""
    file, _, line = source.partition(":")
    path = next(KERNELS.rglob(file), None) if file else None
    return linecache.getline(str(path), int(line)).strip() if path else ""


def break_kernel(
    cases: list[Case], settings: Settings, ptx: str, unbroken: dict[str, Program]
) -> list[tuple[str, int, dict[str, str]]]:
    """(kind, index, how it was noticed) of each mutant of one kernel; the cases' other kernels stay as they are."""
    whole = unbroken[ptx]
    # Broken or not, cases run the same if they never come there, or if a bound is always met.
    reached = [
        acted if instruction.predicate else executed
        for instruction, acted, executed in zip(whole.kernel.instructions, whole.acted, whole.executed, strict=False)
    ]
    found = [m for m in mutants(ptx) if reached[m[1]] and (m[0] != "bound" or whole.masked[m[1]])]

    def broken(replaced: dict[int, Instruction | None]) -> dict[str, str]:
        program = Program(ptx, replaced)
        settings.edit = lambda other: program if other == ptx else unbroken[other]
        return outcome(cases, settings)

    results = {at: broken({at: instruction}) for _, at, instruction in found}
    # The compiler puts one barrier beside another, so that none of them is missed alone. Take away one after the other
    # as long as nobody notices: what is noticed then did the same as some that are gone.
    gone: dict[int, Instruction | None] = {}
    for kind, at, instruction in found:
        if results[at] or kind == "bound":
            continue
        if how := broken({**gone, at: instruction}):
            results[at] = {"redundant": f"without {sorted(gone)}: {how.get('error') or how.get('wrong')}"}
        else:
            gone[at] = instruction
    return [(kind, at, results[at]) for kind, at, _ in found]


def weakened(settings: Settings) -> Iterator[dict[str, str]]:
    """rms_norm_select with each weaker order of its one atomic in global memory."""
    for order in ("acq_rel.gpu", "release.gpu", "acquire.gpu", "relaxed.gpu", "acq_rel.cta"):
        strength, scope = order.split(".")
        text = f"atom.global.{scope}.{strength}.add.u32"

        def edit(ptx: str, text: str = text) -> Program:
            changed, count = re.subn(r"atom\.global\.gpu\.acq_rel\.add\.u32", text, ptx)
            assert count == 1, f"{count} atomics in global memory instead of one"
            return Program(changed)

        settings.edit = edit
        yield {"order": order, **outcome([named(ORDERED)], settings, (None, 1, 2))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90 or sm_100")
    parser.add_argument("--only", default="", help="cases whose title matches this expression")
    parser.add_argument("--ordering", action="store_true", help="weaken the atomic instead of dropping instructions")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    options = parser.parse_args()
    settings = prepare(options.target)
    if options.ordering:
        for result in weakened(settings):
            print(json.dumps(result), flush=True)
        return
    for title in MUTATED:
        if named(title) not in cases_for(options.target):
            continue
        if re.search(options.only, title):
            for result in mutate(title, settings):
                print(row(result) if options.table else json.dumps(result), flush=True)


def row(result: dict[str, Any]) -> str:
    how = next((f"{word}: {result[word]}" for word in ("error", "wrong", "redundant") if word in result), "NOT NOTICED")
    where = f"{result['kernel']} {result['at']:>5} {result['source']:<18}"
    return f"{where} {result['kind']:<20} {result['instruction'][:50]:<50} {how.splitlines()[0][:90]}"


if __name__ == "__main__":
    main()
