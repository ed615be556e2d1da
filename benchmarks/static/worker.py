"""Compiles the cases of one group for one GPU, which need not be present, and measures the machine code.

    python -m benchmarks.static.worker sm_90 attention [--slow] [--table]

Runs in a process of its own, because the interpreter replaces the compiler for a whole process. One JSON object per
case on the standard output:

    case, seconds, launches, and of the kernel: warps, registers, spills (instructions; on AMD registers), shared
    (bytes), instructions, atomics, wide_loads and wide_stores (share of bytes moved 128 bits at a time), and of loops
    with matrix instructions: hot_spills (in the shortest, attention's unmasked one), ntm and ntm_masked (instructions
    other than matrix instructions, issued per million floating-point operations of those, in the shortest and the
    longest of at least two). Or: case, error.
"""

import argparse
import json
import re
import time
from typing import Any

from benchmarks.static import sass
from benchmarks.static.case import Case
from benchmarks.static.cases import CASES


class AbsentGpu:
    """Stands in for Triton's driver: says which GPU to compile for, and has no other ability."""

    def __init__(self, target: str):
        from triton.backends.compiler import GPUTarget

        nvidia = target.startswith("sm_")
        self.target = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)

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
        if "enable_fp_fusion" not in kwargs:
            raise TypeError("the launch does not say enable_fp_fusion, whose default Triton 3.10 changes")
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = compile_only
    return compiled


def measure(kernel: Any) -> dict[str, Any]:
    metadata = kernel.metadata
    common = {"warps": metadata.num_warps, "shared": metadata.shared}
    if "amdgcn" in kernel.asm:
        return {**common, **measure_amd(kernel.asm["amdgcn"])}
    return {**common, **measure_nvidia(kernel.asm["cubin"], metadata.num_warps)}


def measure_amd(text: str) -> dict[str, Any]:
    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise LookupError(f"the assembly has no .{key}")
        return int(found[1])

    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        "atomics": len(re.findall(r"^\s*(?:global|buffer|flat)_atomic_", text, re.MULTILINE)),
    }


def measure_nvidia(cubin: bytes, warps: int) -> dict[str, Any]:
    code = sass.disassemble(cubin)
    measured = {
        "registers": sass.registers(cubin),
        "spills": sass.count(code, sass.SPILLS),
        "atomics": sass.count(code, sass.ATOMICS),
        "instructions": len(code),
        "wide_loads": sass.wide_share(code, ("LDG", "LDGSTS", "LD", "UTMALDG")),
        "wide_stores": sass.wide_share(code, ("STG", "ST")),
    }
    loops = sass.matrix_loops(code)
    if loops:
        measured["hot_spills"] = sass.count(loops[0], sass.SPILLS)
        measured["ntm"] = issued_per_mflop(loops[0])
        measured["ntm_masked"] = issued_per_mflop(loops[-1]) if len(loops) > 1 else None
    return measured


def issued_per_mflop(loop: list[sass.Instruction]) -> float | None:
    """None where a warp alone does not say how many operations an instruction is (tcgen05)."""
    flops = sum(i.flops for i in loop)
    return sum("MMA" not in i.base for i in loop) / (flops / 1e6) if flops else None


def run_case(case: Case, compiled: list[Any]) -> dict[str, Any]:
    compiled.clear()
    began = time.perf_counter()
    try:
        case.launch()
        measured = measure(compiled[0])
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
    )
    shown = "  ".join(f"{key} {measured[key]:.4g}" for key in keys if measured.get(key) is not None)
    return f"{measured['case']:<32} {shown}  ({measured['seconds']:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="sm_80, sm_90, sm_100 or gfx942")
    parser.add_argument("group", help="rows, scores or attention")
    parser.add_argument("--slow", action="store_true", help="the cases marked slow instead of the others")
    parser.add_argument("--table", action="store_true", help="for people instead of JSON")
    options = parser.parse_args()
    compiled = compile_instead_of_launch(options.target)
    for case in CASES:
        if case.group == options.group and case.slow == options.slow:
            measured = run_case(case, compiled)
            print(row(measured) if options.table else json.dumps(measured), flush=True)


if __name__ == "__main__":
    main()
