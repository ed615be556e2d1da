"""Reads the machine code of a compiled NVIDIA kernel with the disassembler inside the Triton wheel."""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SPILLS = ("LDL", "STL")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    op: str  # with its modifiers, such as LDG.E.128
    target: int | None = None  # of a branch

    @property
    def base(self) -> str:
        return self.op.split(".", 1)[0]

    @property
    def bits(self) -> int:
        """Width of a memory access, for one thread."""
        widths = [int(w) for w in re.findall(r"\.[US]?(8|16|64|128|256)(?=\.|$)", self.op)]
        return widths[-1] if widths else 32

    @property
    def flops(self) -> float:
        """Of a matrix instruction, for one warp."""
        if m := re.match(r"HMMA\.(\d\d)(\d)(\d+)", self.op):
            return 2.0 * int(m[1]) * int(m[2]) * int(m[3])
        if m := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.op):
            return 2.0 * int(m[1]) * int(m[2]) * int(m[3]) / 4  # four warps issue it together
        return 0.0


def tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def parse(text: str) -> list[Instruction]:
    """Instructions of ``nvdisasm -c`` output, without the padding behind the last one."""
    labels: dict[str, int] = {}
    pending: list[str] = []
    found: list[tuple[int, str, str | None]] = []
    for line in text.splitlines():
        if m := _LABEL.match(line):
            pending.append(m[1])
        elif m := _INSTRUCTION.match(line):
            address = int(m[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            target = _TARGET.search(m[3])
            found.append((address, m[2], target[1] if target else None))
    instructions = [Instruction(a, op, labels.get(t) if t else None) for a, op, t in found]
    while instructions and (instructions[-1].op == "NOP" or instructions[-1].target == instructions[-1].address):
        instructions.pop()
    return instructions


def disassemble(cubin: bytes) -> list[Instruction]:
    return parse(_run("nvdisasm", "-c", cubin))


def registers(cubin: bytes) -> int:
    return max(int(n) for n in re.findall(r"\bREG:(\d+)", _run("cuobjdump", "--dump-resource-usage", cubin)))


def _run(name: str, option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool(name), option, file.name], check=True, capture_output=True, text=True).stdout


def count(instructions: list[Instruction], bases: tuple[str, ...]) -> int:
    return sum(i.base in bases for i in instructions)


def wide_share(instructions: list[Instruction], bases: tuple[str, ...]) -> float | None:
    """Share of the bytes of these accesses that move 128 bits or more at a time; None without any."""
    bits = [i.bits for i in instructions if i.base in bases]
    return sum(b for b in bits if b >= 128) / sum(bits) if bits else None


def matrix_loops(instructions: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops with matrix instructions, shortest first: the unmasked loop of an attention kernel leads."""
    spans = [s for s in _loops(instructions) if any("MMA" in i.base for i in _within(instructions, s))]
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return sorted((list(_within(instructions, s)) for s in inner), key=len)


def _loops(instructions: list[Instruction]) -> set[tuple[int, int]]:
    """Address ranges that a backward branch closes."""
    return {(i.target, i.address) for i in instructions if i.target is not None and i.target < i.address}


def _within(instructions: list[Instruction], span: tuple[int, int]) -> Iterator[Instruction]:
    return (i for i in instructions if span[0] <= i.address <= span[1])
