"""Ints that write a program: what is computed from a call's numbers, for calls with other ones.

A `Number` stands for an int. It knows its value and by which name it is known in a program that is written meanwhile.
Arithmetic on numbers adds a line to it. So does a question, such as what a check compares: the line says that the
answer must be the same. A number that becomes anything else (a bit length, an index, a float) must be the same itself.
Run with other numbers the program gives what the same code would, or None where that would have gone another way.
"""

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch


class Bound(NamedTuple):
    """A compiled kernel with the grid that it is launched with; a program's result has what indexing by that gives."""

    compiled: Any
    grid: tuple[Any, ...]


def _arithmetic(symbol: str, of: Callable[[Any, Any], Any]) -> tuple[Any, Any]:
    """A method, and the one for numbers on the right."""
    return (
        lambda self, other: self.program.combine(symbol, of, self, other),
        lambda self, other: self.program.combine(symbol, of, other, self),
    )


def _comparison(symbol: str, of: Callable[[Any, Any], bool]) -> Any:
    return lambda self, other: self.program.compare(symbol, of, self, other)


class Number(torch.SymInt):
    """An int of a traced call: its value there, and its name in the program. PyTorch's parsers take it for a length."""

    __class__: Any = property(lambda self: int)  # isinstance must choose as for an int

    def __init__(self, value: int, name: str, program: "Program"):
        self.value, self.name, self.program = value, name, program
        self.fixed = False

    def exact(self) -> int:
        """Its value, which must be that of all calls from now on."""
        if not self.fixed:
            self.program.ask(f"{self.name} == {_literal(self.value)}")
            self.fixed = True
        return self.value

    __add__, __radd__ = _arithmetic("+", operator.add)
    __sub__, __rsub__ = _arithmetic("-", operator.sub)
    __mul__, __rmul__ = _arithmetic("*", operator.mul)
    __mod__, __rmod__ = _arithmetic("%", operator.mod)
    __floordiv__, __rfloordiv__ = _arithmetic("//", operator.floordiv)
    __eq__, __ne__ = _comparison("==", operator.eq), _comparison("!=", operator.ne)
    __lt__, __le__ = _comparison("<", operator.lt), _comparison("<=", operator.le)
    __gt__, __ge__ = _comparison(">", operator.gt), _comparison(">=", operator.ge)

    def __neg__(self) -> Any:
        return 0 - self

    def __bool__(self) -> bool:
        return bool(self != 0)


def _give_the_rest() -> None:
    """What numbers do not follow through is done with their exact values."""
    for name in ("__index__", "__int__", "__float__", "__hash__", "__str__", "__repr__", "__format__", "__invert__",
                 "__abs__", "__round__", "bit_length", "bit_count"):  # fmt: skip
        setattr(Number, name, lambda self, *args, name=name: getattr(self.exact(), name)(*args))
    for name in ("pow", "truediv", "lshift", "rshift", "and", "or", "xor", "divmod"):
        of = divmod if name == "divmod" else getattr(operator, f"__{name}__")
        setattr(Number, f"__{name}__", lambda self, other, of=of: of(self.exact(), exact(other)))
        setattr(Number, f"__r{name}__", lambda self, other, of=of: of(exact(other), self.exact()))


_give_the_rest()


def value_of(x: Any) -> Any:
    """``x`` with the numbers in it as ints."""
    kind = type(x)
    if kind is Number:
        return x.value
    if kind is tuple or kind is list:
        return kind(map(value_of, x))
    if kind is dict:
        return {name: value_of(part) for name, part in x.items()}
    return x


class Program:
    """What is written while numbers are used.

    >>> program = Program([4, 6])
    >>> a, b = program.numbers
    >>> largest = program.function((max(a, b) * 2, -(-b // 4)))
    >>> largest(4, 6), largest(1, 9), largest(9, 1)
    ((12, 2), (18, 3), None)
    """

    def __init__(self, numbers: Sequence[int]):
        self.numbers = [Number(value, f"s{i}", self) for i, value in enumerate(numbers)]
        self.lines: list[tuple[str, str]] = []  # name, and what it is; no name: what must be true
        self.known: dict[str, Any] = {}

    def ask(self, question: str) -> None:
        """From now on the answer to ``question`` must be yes."""
        if question not in self.known:
            self.known[question] = True
            self.lines.append(("", question))

    def combine(self, symbol: str, of: Callable[[Any, Any], Any], a: Any, b: Any) -> Any:
        a, b = _plain(a), _plain(b)
        if type(a) is not Number and type(b) is not Number:
            return of(a, b)
        if not (isinstance(a, int) and isinstance(b, int)):  # a float, say
            return of(exact(a), exact(b))
        text = f"{_text(a)} {symbol} {_text(b)}"
        if text not in self.known:
            value = of(value_of(a), value_of(b))
            self.known[text] = Number(value, f"n{len(self.lines)}", self)
            self.lines.append((self.known[text].name, text))
        return _plain(self.known[text])

    def compare(self, symbol: str, of: Callable[[Any, Any], bool], a: Any, b: Any) -> bool:
        a, b = _plain(a), _plain(b)
        if not (isinstance(a, int) and isinstance(b, int)):
            return of(exact(a), exact(b))
        if type(a) is Number and type(b) is Number and a.name == b.name:
            return of(0, 0)
        answer = of(value_of(a), value_of(b))
        if type(a) is Number or type(b) is Number:
            question = f"{_text(a)} {symbol} {_text(b)}"
            self.ask(question if answer else f"not {question}")
        return answer

    def function(self, result: Any) -> Callable[..., Any]:
        """From numbers to what is like ``result``, or to None."""
        constants: dict[str, Any] = {}
        text = _written(result, constants)
        needed, body = set(re.findall(r"\bn\d+\b", text)), [f" return {text}"]
        for name, line in reversed(self.lines):
            if not name or name in needed:
                needed.update(re.findall(r"\bn\d+\b", line))
                body.append(f" {name} = {line}" if name else f" if not ({line}): return None")
        head = f"def program({', '.join(number.name for number in self.numbers)}):"
        exec("\n".join([head, *reversed(body)]), constants)
        return constants["program"]


def _plain(x: Any) -> Any:
    return x.value if type(x) is Number and x.fixed else x


def exact(x: Any) -> Any:
    """``x``, which must be the same in all calls if it is a number."""
    return x.exact() if type(x) is Number else x


def _text(x: Any) -> str:
    return x.name if type(x) is Number else _literal(x)


def _literal(value: int) -> str:
    return str(int(value)) if value >= 0 else f"({int(value)})"


def _written(x: Any, constants: dict[str, Any]) -> str:
    """The text that makes ``x``; parts without numbers are ``constants``, by name."""

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    if type(_plain(x)) is Number:
        return str(x.name)
    if not _has_numbers(x):
        return constant(value_of(x))
    if type(x) is dict:
        return "{" + ", ".join(f"{name!r}: {_written(part, constants)}" for name, part in x.items()) + "}"
    parts = x if isinstance(x, (tuple, list)) else [getattr(x, field.name) for field in fields(x)]
    text = ", ".join(_written(part, constants) for part in parts)
    if type(x) is Bound:
        return f"{constant(x.compiled)}[{_written(x.grid, constants)}]"
    return f"[{text}]" if type(x) is list else f"({text},)" if type(x) is tuple else f"{constant(type(x))}({text})"


def _has_numbers(x: Any) -> bool:
    if type(x) is dict:
        return any(map(_has_numbers, x.values()))
    if is_dataclass(x) and not isinstance(x, type):
        return any(_has_numbers(getattr(x, field.name)) for field in fields(x))
    return type(_plain(x)) is Number or type(x) is Bound or (isinstance(x, (tuple, list)) and any(map(_has_numbers, x)))
