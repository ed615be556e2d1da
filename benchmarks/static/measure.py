"""What the machine code of a compiled kernel says of its speed.

A measurement holds: warps, registers, spills (instructions; on AMD registers), shared (bytes), instructions, atomics,
wide_loads and wide_stores (share of bytes moved 128 bits at a time), and of loops with matrix instructions: hot_spills
(in the shortest, attention's unmasked one), ntm and ntm_masked (instructions other than matrix instructions, issued
per million floating-point operations of those, in the shortest and the longest of at least two).
"""

import re
from typing import Any

from benchmarks.static import sass


def measure(kernel: Any) -> dict[str, Any]:
    """The measurement of what ``triton.compile`` returned."""
    metadata = kernel.metadata
    common = {"warps": metadata.num_warps, "shared": metadata.shared}
    if "amdgcn" in kernel.asm:
        return {**common, **measure_amd(kernel.asm["amdgcn"])}
    return {**common, **measure_nvidia(kernel.asm["cubin"])}


def measure_amd(text: str) -> dict[str, Any]:
    """From the assembly and the metadata at its end; loops are not looked at."""

    def metadata(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", text)
        if found is None:
            raise LookupError(f"the assembly has no .{key}")
        return int(found[1])

    opcodes = re.findall(r"^\t([a-z]+_\w+)", text, re.MULTILINE)
    return {
        "registers": metadata("vgpr_count"),
        "spills": metadata("vgpr_spill_count") + metadata("sgpr_spill_count"),
        "atomics": sum(bool(re.match(r"(?:global|buffer|flat)_atomic_", op)) for op in opcodes),
        "instructions": len(opcodes),
        "wide_loads": _wide_share(opcodes, "load"),
        "wide_stores": _wide_share(opcodes, "store"),
    }


def _wide_share(opcodes: list[str], access: str) -> float | None:
    """As `sass.wide_share`, from names such as ``buffer_load_dwordx4`` and ``global_store_b128``."""
    widths = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32}
    found = [m[1] for op in opcodes if (m := re.match(rf"(?:global|buffer|flat)_{access}_(\w+)", op))]
    bits = [widths.get(name, 8 if "8" in name or "byte" in name else 16) for name in found]
    return sum(b for b in bits if b >= 128) / sum(bits) if bits else None


def measure_nvidia(cubin: bytes) -> dict[str, Any]:
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
