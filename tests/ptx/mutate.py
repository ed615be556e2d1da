"""Breaks kernels on purpose, one instruction at a time, to see whether the checks notice.

    python -m tests.ptx.mutate sm_90 [--only REGEX] [--table] [--done FILE]  # drop each barrier, wait, fence and bound
    python -m tests.ptx.mutate sm_90 --ordering                              # weaken the atomic of rms_norm_select

One JSON object per mutant on the standard output: case, kernel, kind, at, instruction, source, and how it was noticed:
error (the checks), wrong (another result), redundant (once others of which none is missed are gone), or none.
What is run is counted on the standard error. With --done, what each run gave is kept in FILE as it comes, and is not
run again as long as the kernel, the cases' arguments and the checks are the same.
"""

import argparse
import hashlib
import itertools
import json
import linecache
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

import ptx_check
from ptx_check.errors import PtxError
from ptx_check.mutate import mutate
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
    "apply_rotary_and_cache_, 2 heads of 80, 32 turned, float32": (),
    "rms_norm_score, own sink, several rows a program, bfloat16": (),
    "rms_norm_select, own sink, several rows a program, bfloat16": (),
    "rms_norm_select, scores counted, bfloat16": (),
    "rms_norm_select, packed, float32": (),
    # Whose copies run ahead of the loop.
    "rms_norm_score, residual, many rows a program, bfloat16": (),
    "rms_norm_select, many rows a program, bfloat16": (),
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
SEEDS = (1,)  # what the checks notice does not depend on the schedule
KERNELS = Path(__file__).resolve().parents[2] / "orthorank_kernels" / "triton"


def named(title: str) -> Case:
    (case,) = (c for c in CASES if c.title == title)
    return case


def run_all(cases: list[Case], settings: Settings, seeds: tuple[int | None, ...] = SEEDS) -> None:
    """Raises what the first of these cases finds wrong."""
    for case, seed in itertools.product(cases, seeds):
        settings.seed, settings.resident = seed, RESIDENT
        compare(case, call(case, "triton"))


class Kept(dict[str, tuple[str, str]]):
    """What runs of one kernel gave, by what was dropped; in a file, if there is one, where each is written at once.

    Args:
        name: of the kernel.
        key: `digest` of what the outcomes follow from; of a file, lines with another one are left alone.
    """

    def __init__(self, path: Path | None, name: str, key: str):
        super().__init__()
        self.path, self.name, self.key = path, name, key
        self.began, self.runs = time.monotonic(), 0
        for line in path.read_text().splitlines() if path and path.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # of a process that was ended as it wrote
                continue
            if row["of"] == key:
                super().__setitem__(row["dropped"], (row["noticed"], row["message"]))

    def __setitem__(self, dropped: str, outcome: tuple[str, str]) -> None:
        super().__setitem__(dropped, outcome)
        self.runs += 1
        if self.path:
            noticed, message = outcome
            row = {"kernel": self.name, "of": self.key, "dropped": dropped, "noticed": noticed, "message": message}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")

    def tell(self, done: int, of: int) -> None:
        """On the standard error: how much is done, and when all will be if nothing else was kept."""
        each = (time.monotonic() - self.began) / self.runs if self.runs else None
        left = f", about {each * (of - done):.0f} s left" if each else ""
        print(f"{self.name}: {done} of {of}{left}", file=sys.stderr, flush=True)


def digest(target: str, kernels: Iterable[str], cases: list[Case]) -> str:
    """Of what an outcome follows from: the kernels, what the cases call them with, and the checks."""
    found = hashlib.sha256(repr((target, SEEDS, RESIDENT, *kernels)).encode())
    for case in cases:
        found.update(repr((case.title, case.forced, case.settings, case.environment)).encode())
        for name, value in case.arguments(case.dtype).items():
            found.update(name.encode())
            if isinstance(value, torch.Tensor):
                found.update(repr((value.dtype, value.shape, value.stride())).encode())
                found.update(value.flatten().view(torch.uint8).numpy().tobytes())
            else:
                found.update(repr(value).encode())
    for path in sorted(Path(ptx_check.__file__).parent.glob("*.py")):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def mutate_case(title: str, target: str, settings: Settings, done: Path | None = None) -> Iterator[dict[str, Any]]:
    """Break what a case executes, one instruction of one of its kernels after the other."""
    cases = [named(title), *map(named, MUTATED[title])]
    unbroken: dict[str, Program] = {}
    settings.edit = lambda ptx: unbroken.setdefault(ptx, Program(ptx))
    settings.launches = []
    run_all(cases, settings)
    kernels = {launch.ptx: launch.name for launch in settings.launches}
    for ptx, name in kernels.items():

        def run(program: Program, ptx: str = ptx) -> None:
            """With the cases' other kernels as they are."""
            settings.edit = lambda other: program if other == ptx else unbroken[other]
            run_all(cases, settings)

        kept = Kept(done, name, digest(target, (ptx, *kernels), cases))
        for mutant in mutate(ptx, run, kept, kept.tell):
            instruction = mutant.instruction
            yield {
                "case": title,
                "kernel": name,
                "kind": mutant.kind,
                "at": mutant.at,
                "instruction": instruction.text[:100],
                "source": instruction.source,
                "line": line_of(instruction.source),
                **({mutant.noticed: mutant.message} if mutant.noticed else {}),
            }
    settings.edit = None


def line_of(source: str) -> str:
    """The line of a kernel's source that "scoring.py:91" names; empty if it is not one of this package."""
    file, _, line = source.partition(":")
    path = next(KERNELS.rglob(file), None) if file else None
    return linecache.getline(str(path), int(line)).strip() if path else ""


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
        try:
            run_all([named(ORDERED)], settings, (None, 1, 2))
        except PtxError as error:
            yield {"order": order, "error": f"{type(error).__name__}: {error}"}
        else:
            yield {"order": order}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90 or sm_100")
    parser.add_argument("--only", default="", help="cases whose title matches this expression")
    parser.add_argument("--ordering", action="store_true", help="weaken the atomic instead of dropping instructions")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    parser.add_argument("--done", type=Path, help="a file of what runs gave: what is in it is not run again")
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
            for result in mutate_case(title, options.target, settings, options.done):
                print(row(result) if options.table else json.dumps(result), flush=True)


def row(result: dict[str, Any]) -> str:
    how = next((f"{word}: {result[word]}" for word in ("error", "wrong", "redundant") if word in result), "NOT NOTICED")
    where = f"{result['kernel']} {result['at']:>5} {result['source']:<18}"
    return f"{where} {result['kind']:<20} {result['instruction'][:50]:<50} {how.splitlines()[0][:90]}"


if __name__ == "__main__":
    main()
