"""PTX text to instructions: labels and register names made unique, each instruction with its line of the source.

Knows the shape of PTX (scopes in braces, predicates, operands), not what instructions mean.
"""

import re
from dataclasses import dataclass, field
from pathlib import PurePath

from ptx_check.errors import PtxError

_TOKEN = re.compile(
    r"\s*(?:(?P<loc>\.loc[^\n]*)\n|(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<statement>[^;]*?(?:\{[^{}]*\}[^;{}]*)*);)"
)
_INSTRUCTION = re.compile(
    r"(?:@(?P<negated>!?)(?P<predicate>[%\w$#]+)\s+)?(?P<opcode>[a-z][\w.:]*)\s*(?P<operands>.*)$"
)
_NAME = re.compile(r"(?<![\w%$.:])[A-Za-z_$%][\w$]*")

LIBRARY = "/triton/language/"  # files whose lines say nothing of a kernel


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@!%p1 add.s32 %r1, %r2, 3`` has opcode ("add", "s32") and three operands."""

    text: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    predicate: str | None
    negated: bool
    source: str  # "attention.py:88", or "" where the compiler says none


@dataclass
class Kernel:
    """A decoded entry function."""

    name: str
    threads: int
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset and size in bytes
    parameter_types: list[str] = field(default_factory=list)  # "u", "s", "f" or "b" of each
    parameter_bytes: int = 0
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)  # of branches by number: the labels they choose among
    registers: dict[str, str] = field(default_factory=dict)  # name or prefix -> type, as declared


def decode(ptx: str) -> Kernel:
    """Decode the one entry function of ``ptx``."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx))
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entry = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)([^{]*)\{", ptx, re.DOTALL)
    if entry is None:
        raise PtxError("no entry function in this PTX, which is the text of a file, not its name")
    threads = re.search(r"\.reqntid\s+(\d+((?:\s*,\s*\d+)*))", entry[3])
    if threads is None:
        raise PtxError("the entry function does not say how many threads it has (.reqntid)")
    if int(threads[1].split(",")[0]) % 32 or set(re.findall(r"\d+", threads[2])) - {"1"}:
        raise PtxError(f"the entry function has .reqntid {threads[1]}; only whole warps are run, along x alone")
    kernel = Kernel(entry[1], int(threads[1].split(",")[0]))
    _decode_parameters(kernel, entry[2])
    _Body(kernel, ptx, entry.end(), files).decode()
    return kernel


def _decode_parameters(kernel: Kernel, text: str) -> None:
    offset = 0
    for parameter in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w)(\d+)\s+(?:\.ptr.*\s)?([\w$]+)(?:\[(\d+)\])?", parameter
        )
        if match is None:
            raise PtxError(f"cannot read the parameter {parameter!r}")
        size = int(match[3]) // 8
        alignment = int(match[1] or size)
        offset = (offset + alignment - 1) // alignment * alignment
        kernel.parameters[match[4]] = (offset, size * int(match[5] or 1))
        kernel.parameter_types.append(match[2])
        offset += size * int(match[5] or 1)
    kernel.parameter_bytes = offset


class _Body:
    """Walks the body once. Names declared in an inner scope get ``#`` and the number of the scope."""

    def __init__(self, kernel: Kernel, ptx: str, start: int, files: dict[str, str]):
        self.kernel, self.ptx, self.at, self.files = kernel, ptx, start, files
        self.source = ""
        self.callers: dict[tuple[str, ...], tuple[str, ...]] = {}  # of inlined functions, as file, line and column
        self.scopes: list[int] = [0]
        self.opened = 0
        self.declared: dict[int, set[str]] = {0: set()}
        self.label = ""  # the last one
        self.statements: list[tuple[str, str, tuple[int, ...]]] = []  # text, source, scopes it lies in

    def decode(self) -> None:
        while self.scopes:
            token = _TOKEN.match(self.ptx, self.at)
            if token is None:
                raise PtxError(f"cannot read PTX at {self.ptx[self.at : self.at + 80]!r}")
            self.at = token.end()
            if token["loc"]:
                self._location(token["loc"])
            elif token["brace"]:
                self._brace(token["brace"])
            elif token["label"]:
                self._label(token["label"])
            elif token["statement"].startswith(".reg"):
                self._declare(token["statement"])
            elif token["statement"].startswith(".branchtargets"):
                self._table(token["statement"])
            elif token["statement"] and not token["statement"].startswith("."):
                text = " ".join(token["statement"].split())
                self.statements.append((text, self.source, tuple(self.scopes)))
        self.kernel.instructions = [self._instruction(*statement) for statement in self.statements]

    def _location(self, text: str) -> None:
        """The line of the kernel: of a function of Triton's own library, that of its call."""
        numbers = re.findall(r"(\d+) (\d+) (\d+)", text.replace("\t", " "))
        place, caller = numbers[0], numbers[1] if "inlined_at" in text else None
        if place[1] == "0":
            return
        if caller is not None:
            self.callers[place] = caller
        for _ in range(8):  # a call within a call
            if LIBRARY in self.files.get(place[0], "") and place in self.callers:
                place = self.callers[place]
        self.source = f"{PurePath(self.files.get(place[0], '?')).name}:{place[1]}"

    def _brace(self, brace: str) -> None:
        if brace == "}":
            self.scopes.pop()
            return
        self.opened += 1
        self.scopes.append(self.opened)
        self.declared[self.opened] = set()

    def _own(self, name: str) -> str:
        self.declared[self.scopes[-1]].add(name)
        return name if len(self.scopes) == 1 else f"{name}#{self.scopes[-1]}"

    def _label(self, name: str) -> None:
        self.label = self._own(name)
        self.kernel.labels[self.label] = len(self.statements)

    def _table(self, text: str) -> None:
        """The labels of a `.branchtargets`, which has a label of its own. Only outside of inner scopes."""
        if len(self.scopes) > 1:
            raise PtxError("a .branchtargets inside of braces is not known here")
        self.kernel.tables[self.label] = text.removeprefix(".branchtargets").replace(",", " ").split()

    def _declare(self, text: str) -> None:
        kind, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL).groups()
        for name in names.split(","):
            self.kernel.registers[self._own(name.strip())] = kind

    def _instruction(self, text: str, source: str, scopes: tuple[int, ...]) -> Instruction:
        def unique(match: re.Match) -> str:
            for scope in reversed(scopes[1:]):
                if match[0] in self.declared[scope]:
                    return f"{match[0]}#{scope}"
            return match[0]

        match = _INSTRUCTION.match(_NAME.sub(unique, text) if len(scopes) > 1 else text)
        if match is None:
            raise PtxError(f"cannot read the instruction {text!r}")
        operands = tuple(split_operands(match["operands"]))
        return Instruction(
            text, tuple(match["opcode"].split(".")), operands, match["predicate"], match["negated"] == "!", source
        )


def split_operands(text: str) -> list[str]:
    """Split at the commas that are not inside brackets or braces."""
    operands, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[(") - (character in "}])")
        if character == "," and depth == 0:
            operands.append(current.strip())
            current = ""
        else:
            current += character
    return [*operands, current.strip()] if current.strip() else operands
