"""Compiles cases for one GPU, which need not be present, and measures the machine code.

    python -m benchmarks.static.worker sm_90 attention [--slow] [--only REGEX] [--table]
    python -m benchmarks.static.worker sm_90 rows --names   # with a JSON object on the standard input: asked, by name

Runs in a process of its own, because the interpreter replaces the compiler for a whole process. One JSON object per
case on the standard output: case, asked, seconds, launches and a measurement (see `measure`), or: case, error. Where
the compiler would be asked for what it was asked for when the case was measured last, nothing is compiled: case, asked.
"""

import argparse
import json
import re
import sys
import time
from typing import Any

from benchmarks.static.case import IN_FLIGHT_LIMIT, Case
from benchmarks.static.cases import CASES
from benchmarks.static.fingerprint import code_of, digest, measuring
from benchmarks.static.in_flight import in_flight
from benchmarks.static.measure import measure
from benchmarks.static.peers import PEERS


class AbsentGpu:
    """Stands in for Triton's driver: says which GPU to compile for, and has no other ability."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        if target.startswith("sm_"):
            self.target = GPUTarget("cuda", int(target[3:]), 32)
        else:
            self.target = GPUTarget("hip", target, 32 if target.startswith("gfx1") else 64)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead_of_launch(target: str) -> list[Any]:
    """From now on ``kernel[grid](...)`` compiles and appends the compiled kernel to the list that is returned."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from orthorank_kernels.triton import configs

    driver.set_active(AbsentGpu(target))
    configs._gpu_target = lambda index: target
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if self.fn.__module__.startswith("orthorank_kernels") and "enable_fp_fusion" not in kwargs:
            raise TypeError("the launch does not say enable_fp_fusion, whose default Triton 3.10 changes")
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    return compiled


def asked(case: Case, target: str) -> str:
    """A hash of all that the launches of ``case`` ask the compiler for, and of what measures the outcome.

    Nothing is compiled. Before any other case is, since what a process has compiled it asks for no more.
    """
    import triton
    from triton import knobs

    requests: list[str] = []

    def note(*, key: str, fn: Any, **_: Any) -> bool:
        requests.append(f"{fn.jit_function.cache_key} {key}")
        return True  # which says that there is nothing to compile

    knobs.runtime.jit_cache_hook = note
    try:
        case.launch()
    except Exception:
        return ""  # compiling it says why
    finally:
        knobs.runtime.jit_cache_hook = None
    return digest(target, triton.__version__, *map(code_of, measuring(case)), *requests) if requests else ""


def run_case(case: Case, target: str, compiled: list[Any]) -> dict[str, Any]:
    compiled.clear()
    began = time.perf_counter()
    try:
        case.launch()
        measured = measure(compiled[0])
        if IN_FLIGHT_LIMIT in case.limits_for(target):
            measured |= in_flight(compiled[0], measured, target)
    except Exception as error:  # a case that does not compile is a result like the others
        return {"case": case.name, "error": f"{type(error).__name__}: {error}"[:4000]}
    return {"case": case.name, "seconds": time.perf_counter() - began, "launches": len(compiled), **measured}


def row(measured: dict[str, Any]) -> str:
    if "error" in measured:
        return f"{measured['case']:<32} {measured['error'].splitlines()[-1]}"
    keys = (
        "warps",
        "registers",
        "spills",
        "shared",
        "instructions",
        "wide_loads",
        "hot_spills",
        "ntm",
        "ntm_masked",
        "in_flight",
    )
    shown = "  ".join(f"{key} {measured[key]:.4g}" for key in keys if measured.get(key) is not None)
    return f"{measured['case']:<32} {shown}  ({measured['seconds']:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90, sm_100, gfx942 or gfx1100")
    parser.add_argument("group", help="rows, scores, attention or peers")
    parser.add_argument("--slow", action="store_true", help="the cases marked slow instead of the others")
    parser.add_argument("--only", default="", metavar="REGEX", help="of these the cases whose name matches")
    parser.add_argument("--names", action="store_true", help="cases by name, from the standard input")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    options = parser.parse_args()
    cases = [case for case in (*CASES, *PEERS) if case.group == options.group]
    if options.names:
        known = json.load(sys.stdin)
        cases = [case for case in cases if case.name in known]
    else:
        known = {}
        cases = [case for case in cases if case.slow == options.slow and re.search(options.only, case.name)]
    compiled = compile_instead_of_launch(options.target)
    asks = {case.name: asked(case, options.target) if case.group != "peers" else "" for case in cases}
    for case in cases:
        if asks[case.name] and asks[case.name] == known.get(case.name):
            measured = {"case": case.name}
        else:
            measured = run_case(case, options.target, compiled)
        measured["asked"] = asks[case.name]
        print(row(measured) if options.table else json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
