"""Runs cases for one GPU, which need not be present, and compares them with their references.

    python -m tests.ptx.worker sm_90 attention [--slow] [--only REGEX] [--seeds 0 1 2] [--done FILE]

Runs in a process of its own, because the interpreter replaces the compiler for a whole process. One JSON object per
case on the standard output: case, seconds, kernels, steps, instructions; or: case, seed, error. Seed 0 runs programs in
order. Cases of which FILE has such an object without an error are not run again.
"""

import argparse
import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

import orthorank_kernels
from orthorank_kernels import dispatch
from orthorank_kernels.settings import lookup as _settings
from tests.orthorank_kernels.tools import assert_within_budget, poisoned_outputs
from tests.ptx.case import Case
from tests.ptx.cases import cases_for
from tests.ptx.launchers import Settings, program_of, run_instead_of_launch

RESIDENT = 3


def prepare(target: str) -> Settings:
    """Let ``backend="triton"`` take CPU tensors, for kernels that run here."""
    dispatch.triton_unavailable = lambda device: None
    return run_instead_of_launch(target)


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Inside, references get their tensors in float64, which the public functions would refuse."""

    def run(op: Any, args: tuple[Any, ...], **_: Any) -> Any:
        wide = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
        result = op.reference(*wide)
        for narrow, changed in zip(args, wide, strict=True):
            if result is None and changed is not narrow and isinstance(narrow, torch.Tensor):
                narrow.copy_(changed)  # what an op without a result wrote into
        return result

    plain, dispatch.run = dispatch.run, run
    try:
        yield
    finally:
        dispatch.run = plain


@contextlib.contextmanager
def forced(case: Case) -> Iterator[None]:
    """Inside, the launchers have the constants and settings that the case asks for."""
    from orthorank_kernels.triton import attention_launch

    before = {name: getattr(attention_launch, name) for name in case.forced}
    vars(attention_launch).update(case.forced)
    for op, changes in case.settings.items():
        for kind in _settings.kinds(op):
            _settings._OVERRIDES[op, kind] = {**_settings.default(op, kind, "sm_90"), **changes}
    outside = {name: os.environ.get(name) for name in case.environment}
    os.environ.update(case.environment)
    try:
        yield
    finally:
        for name, value in outside.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        vars(attention_launch).update(before)
        _settings._OVERRIDES.clear()


def call(case: Case, backend: str, exact: bool = False) -> list[torch.Tensor]:
    """What the case's op gives; ``exact``: in float64."""
    arguments = case.arguments(case.dtype)
    arguments = {n: v.clone() if n in case.writes else v for n, v in arguments.items()}
    with poisoned_outputs(), forced(case), in_float64() if exact else contextlib.nullcontext():
        result = getattr(orthorank_kernels, case.op)(**arguments, backend=backend)
    if case.writes:
        result = tuple(arguments[name] for name in case.writes)
    results = result if isinstance(result, tuple) else (result,)
    return [x for x in results if isinstance(x, torch.Tensor)]


def compare(case: Case, results: list[torch.Tensor]) -> None:
    """Integers are equal, floats within the error budget; a value that nobody wrote is NaN and so neither."""
    eager, exact = call(case, "torch"), call(case, "reference", exact=True)
    assert len(results) == len(eager) == len(exact)
    for number, (x, e, double) in enumerate(zip(results, eager, exact, strict=True)):
        if x.is_floating_point():
            assert_within_budget(x, e, double, x.dtype, f"result {number}")
        else:
            assert torch.equal(x, e), f"result {number}: {int((x != e).sum())} of {x.numel()} integers differ"


def run_case(case: Case, settings: Settings, seeds: list[int]) -> dict[str, Any]:
    began = time.perf_counter()
    settings.launches.clear()
    for seed in seeds:
        settings.seed, settings.resident = seed or None, RESIDENT
        try:
            compare(case, call(case, "triton"))
        except Exception as error:  # a case that fails is a result like the others
            return {"case": case.title, "seed": seed, "error": f"{type(error).__name__}: {error}"[:4000]}
    return {
        "case": case.title,
        "seconds": round(time.perf_counter() - began, 2),
        "kernels": sorted({launch.name for launch in settings.launches}),
        "steps": sum(launch.steps for launch in settings.launches),
        "instructions": sorted({form for launch in settings.launches for form in forms(launch.ptx)}),
    }


@lru_cache
def forms(ptx: str) -> frozenset[str]:
    """The instruction forms of a kernel: its opcodes."""
    return frozenset(".".join(instruction.opcode) for instruction in program_of(ptx).kernel.instructions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90 or sm_100")
    parser.add_argument("group", help="rows, scores or attention")
    parser.add_argument("--slow", action="store_true", help="the cases marked slow instead of the others")
    parser.add_argument("--only", default="", help="cases whose title matches this expression")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--done", type=Path, help="a file of results: what is in it is not run again")
    options = parser.parse_args()
    done = set()
    if options.done and options.done.exists():
        results = map(json.loads, options.done.read_text().splitlines())
        done = {result["case"] for result in results if "error" not in result}
    settings = prepare(options.target)
    for case in cases_for(options.target):
        chosen = case.group == options.group and case.slow == options.slow and case.title not in done
        if chosen and re.search(options.only, case.title):
            print(json.dumps(run_case(case, settings, options.seeds)), flush=True)


if __name__ == "__main__":
    main()
