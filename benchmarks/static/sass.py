"""Reads the machine code of a compiled NVIDIA kernel with the disassembler inside the Triton wheel."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

SPILLS = ("LDL", "STL")
ATOMICS = ("ATOM", "ATOMG", "RED", "REDG")
_LABEL = re.compile(r"^(\.L_\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    address: int
    op: str  # with its modifiers, such as LDG.E.128
    operands: str = ""
    predicate: str = ""
    target: int | None = None  # address that a branch names

    @property
    def base(self) -> str:
        return self.op.split(".", 1)[0]

    @property
    def bits(self) -> int:
        """Width of a memory access, for one thread."""
        if self.base == "UTMALDG":  # a whole tile: at least so much for each thread of the block
            return 128
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
    found: list[tuple[int, str, str, str]] = []
    for line in text.splitlines():
        if m := _LABEL.match(line):
            pending.append(m[1])
        elif m := _INSTRUCTION.match(line):
            address = int(m[1], 16)
            labels.update(dict.fromkeys(pending, address))
            pending.clear()
            found.append((address, m[3], m[4], m[2] or ""))
    instructions = []
    for address, op, operands, predicate in found:
        named = _TARGET.search(operands)
        instructions.append(Instruction(address, op, operands, predicate, labels.get(named[1]) if named else None))
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


def matrix_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops with matrix instructions, shortest first: the unmasked loop of an attention kernel leads.

    Loops inside them, in which a thread waits for memory, are left out.
    """
    if not any("MMA" in instruction.base for instruction in code):
        return []
    loops = natural_loops(code)
    matrix = [loop for loop in loops if any("MMA" in code[i].base for i in loop)]
    innermost = [loop for loop in matrix if not any(other < loop for other in matrix)]
    own = (loop - set().union(*(other for other in loops if other < loop)) for loop in innermost)
    return sorted(([code[i] for i in sorted(loop)] for loop in own), key=len)


def natural_loops(code: list[Instruction]) -> list[set[int]]:
    """Loops as sets of indices into ``code``: what reaches a jump to an instruction that dominates the jump.

    Addresses do not tell: the compiler puts parts of a loop far from it.
    """
    successors = _successors(code)
    order = _reverse_postorder(successors)
    predecessors: list[list[int]] = [[] for _ in code]
    for i in order:
        for successor in successors[i]:
            predecessors[successor].append(i)
    dominators = _dominators(order, predecessors)
    loops: dict[int, set[int]] = {}
    for tail in order:
        for head in successors[tail]:
            if dominators[tail] >> head & 1:
                body, work = loops.setdefault(head, {head}), [tail]
                while work:
                    i = work.pop()
                    if i not in body:
                        body.add(i)
                        work.extend(predecessors[i])
    return list(loops.values())


def _successors(code: list[Instruction]) -> list[list[int]]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    meeting_points: dict[str, int | None] = {}  # by barrier register, which serves one part of the code after another
    successors: list[list[int]] = []
    for i, instruction in enumerate(code):
        if instruction.base == "BSSY":
            meeting_points[instruction.operands.split(",")[0]] = instruction.target
        target, goes_on = None, True
        if instruction.base in ("EXIT", "RET", "KILL", "BRX"):
            goes_on = bool(instruction.predicate)
        elif instruction.base in ("BRA", "JMP") and ".DIV" not in instruction.op:
            target = instruction.target
            goes_on = bool(instruction.predicate) or bool(re.match(r"!?U?P\d", instruction.operands))
        elif instruction.base == "BSYNC":
            target = meeting_points.get(instruction.operands.split(",")[-1].strip())
            goes_on = bool(instruction.predicate) or target is None
        successors.append([index[target]] if target in index else [])
        if goes_on and i + 1 < len(code):
            successors[i].append(i + 1)
    return successors


def _reverse_postorder(successors: list[list[int]]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(successors[0]))]
    while stack:
        node, rest = stack[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            order.append(node)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(successors[following])))
    return order[::-1]


def _dominators(order: list[int], predecessors: list[list[int]]) -> dict[int, int]:
    """Of each reachable instruction, the set (as bits) of those that every path to it runs through."""
    everything = (1 << len(predecessors)) - 1
    dominators = dict.fromkeys(order, everything)
    dominators[order[0]] = 1 << order[0]
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            common = everything
            for predecessor in predecessors[i]:
                common &= dominators[predecessor]
            common |= 1 << i
            if common != dominators[i]:
                dominators[i], changed = common, True
    return dominators
