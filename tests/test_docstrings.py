"""Docstrings of all that `docs/stable.md` calls public: tensors have shapes, and every argument is spoken of."""

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

MODULES = (
    "orthorank_kernels",
    "orthorank",
    "orthorank.plans",
    "orthorank.search",
    "orthorank.calibration",
    "orthorank.evaluation",
    "orthorank.analysis",
    "orthorank.packed",
)
# What gives a tensor's shape: written out, or as that of another argument.
SHAPE = re.compile(r"\[[^\]]*\]|\bscalar\b|\blaid out\b|\bshapes?\b|\blike\b|\bas for `\w+`")


def public(module: str) -> Iterator[tuple[str, Callable[..., Any]]]:
    """What a module exports and one can call, but for exceptions, which take a sentence."""
    exported = importlib.import_module(module)
    for name in exported.__all__:
        value = getattr(exported, name)
        if callable(value) and not (isinstance(value, type) and issubclass(value, Exception)):
            yield name, value


def entries(docstring: str) -> dict[str, str]:
    """Names under ``Args:`` or ``Attributes:``, each with what is said of it.

    >>> entries("Sum.\\n\\nArgs:\\n    x: [n].\\n        Any.\\n    a, b: two. c: one.\\n\\nReturns:\\n    y: no.")
    {'x': '[n]. Any.', 'a': 'two.', 'b': 'two.', 'c': 'one.'}
    """
    sections = re.findall(r"^(?:Args|Attributes):\n((?:    .*\n|\n)*)", docstring + "\n", re.MULTILINE)
    text = re.sub(r"\n {8,}", " ", "".join(sections))
    found = {}
    for names, said in re.findall(
        r"(?:^ {4}|(?<=[.;] ))(\w+(?:, \w+)*): (.+?)(?=$|(?<=[.;]) \w+(?:, \w+)*: )", text, re.M
    ):
        found |= dict.fromkeys(names.split(", "), said)
    return found


def complaints(name: str, value: Callable[..., Any]) -> list[str]:
    """What a docstring leaves out.

    >>> def scaled(x: "Tensor", by: float):
    ...     '''Multiply.
    ...
    ...     Args:
    ...         x: any numbers.
    ...     '''
    >>> complaints("scaled", scaled)
    ['scaled: no shape of x', 'scaled: nothing on by']
    """
    docstring = inspect.getdoc(value) or ""
    said, found = entries(docstring), []
    for parameter in inspect.signature(value).parameters.values():
        kind = str(parameter.annotation)
        if re.search(r"\bTensor\b", kind) and "Callable" not in kind:
            if not SHAPE.search(said.get(parameter.name, "")):
                found.append(f"{name}: no shape of {parameter.name}")
        elif not re.search(rf"\b{parameter.name}\b", docstring) and parameter.kind not in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            found.append(f"{name}: nothing on {parameter.name}")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_every_argument_is_explained(module: str) -> None:
    found = [complaint for name, value in public(module) for complaint in complaints(name, value)]
    assert not found, "\n".join(found)
