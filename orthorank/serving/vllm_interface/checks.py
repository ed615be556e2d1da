"""What may be expected of a name of vLLM, before it is used: a type, a signature, fields. `interface` lists the names.

A check is given what was found, and says in words what is wrong with it, or None. Types of vLLM and PyTorch are known
by name, since checks are made before either is imported.
"""

import dataclasses
import importlib
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orthorank.common.errors import OrthoRankError, type_of, with_article

TESTED = "0.32"


@dataclasses.dataclass(frozen=True)
class Check:
    """One expectation.

    Args:
        look: what is wrong with what was found; names: further names that its source must hold.
        optional: an object may lack it.
    """

    look: Callable[[Any], str | None]
    names: tuple[str, ...] = ()
    optional: bool = False

    def __call__(self, found: Any) -> str | None:
        """What is wrong, in words. Whatever goes wrong while looking is said, too: sources and signatures may lack."""
        try:
            return self.look(found)
        except Exception as error:
            return f"cannot be looked at ({type(error).__name__}: {error})"


# By module and name; of an object's attribute a type will do.
Group = Mapping[str, Mapping[str, Check]]
Expected = Check | type | tuple[type, ...]


def called_with(*names: str) -> Check:
    """A function that may be called with these arguments, by name, and needs no others."""

    def look(found: Any) -> str | None:
        if not callable(found):
            return f"is {type_of(found)}, not a function"
        known = inspect.signature(found).parameters
        if lacking := [name for name in names if name not in known]:
            return f"has no argument {', '.join(lacking)}"
        filled = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        more = [p.name for p in known.values() if p.default is p.empty and p.kind not in filled]
        if more := [name for name in more if name not in names]:
            return f"needs an argument {', '.join(more)}"
        return None

    return Check(look)


def called_as(count: int, *names: str) -> Check:
    """A function that may be called with so many arguments by place, and these by name.

    Example:
        >>> called_as(1, "sep")(print), called_as(2, "key")(sorted)
        (None, 'cannot be called with 2 arguments and key: too many positional arguments')
    """

    def look(found: Any) -> str | None:
        if not callable(found):
            return f"is {type_of(found)}, not a function"
        signature = inspect.signature(found)
        try:
            signature.bind(*[None] * count, **dict.fromkeys(names))
        except TypeError as error:
            return f"cannot be called with {count} arguments{''.join(f' and {name}' for name in names)}: {error}"
        return None

    return Check(look)


def begins_with(*names: str) -> Check:
    """A function whose first arguments are these: it is stood in for, and called as vLLM calls it, with more if so."""

    def look(found: Any) -> str | None:
        if not inspect.isroutine(found):
            return f"is {type_of(found)}, not a function"
        first = tuple(inspect.signature(found).parameters)[: len(names)]
        return None if first == names else f"begins with the arguments {', '.join(first)}, not {', '.join(names)}"

    return Check(look)


def takes(*names: str) -> Check:
    """A function with these arguments and no others: this package answers in its place, and would pass over more.

    Example:
        >>> takes("real", "imag")(lambda real, imag, base=10: None)
        'has the arguments real, imag, base, not real, imag'
    """

    def look(found: Any) -> str | None:
        if not inspect.isroutine(found):
            return f"is {type_of(found)}, not a function"
        known = tuple(inspect.signature(found).parameters)
        return None if known == names else f"has the arguments {', '.join(known)}, not {', '.join(names)}"

    return Check(look)


def may_lack(method: str, argument: int) -> Check:
    """An object with a method whose argument of that place (from 0, without self) may be None."""

    def look(found: Any) -> str | None:
        known = list(inspect.signature(getattr(found, method)).parameters.values())
        if len(known) <= argument:
            return f"has a {method} of {len(known)} arguments, not {argument + 1}"
        asked = known[argument]
        return None if asked.default is None else f"has a {method} that needs {asked.name}"

    return Check(look)


def gives(name: str) -> Check:
    """A function without arguments that gives a class of that name, or one derived of it."""

    def look(found: Any) -> str | None:
        given = found()
        if not isinstance(given, type):
            return f"gives {type_of(given)}, not a class"
        return None if name in _names(given) else f"gives {given.__name__}, which is no {name}"

    return Check(look)


def a(*types: type) -> Check:
    """An object of one of these types."""

    def look(found: Any) -> str | None:
        return None if isinstance(found, types) else f"is {type_of(found)}, not {with_article(types[0].__name__)}"

    return Check(look)


def kind(*names: str) -> Check:
    """An object of a class of one of these names, or of one derived of it.

    Example:
        >>> kind("int", "NoneType")(True), kind("Tensor")([])
        (None, 'is a list, not a Tensor')
    """

    def look(found: Any) -> str | None:
        known = not _names(type(found)).isdisjoint(names)
        return None if known else f"is {type_of(found)}, not {' or '.join(map(with_article, names))}"

    return Check(look)


def if_there(check: Check) -> Check:
    """``check``, of an attribute that an object may lack."""
    return dataclasses.replace(check, optional=True)


def _function(found: Any) -> str | None:
    return None if inspect.isroutine(found) else f"is {type_of(found)}, not a function"


# Any function: it is called with whatever vLLM gives.
function = Check(_function)


def with_fields(*names: str) -> Check:
    """A dataclass with these fields."""

    def look(found: Any) -> str | None:
        if not dataclasses.is_dataclass(found):
            return "is no dataclass"
        known = {field.name for field in dataclasses.fields(found)}
        lacking = [name for name in names if name not in known]
        return f"has no field {', '.join(lacking)}" if lacking else None

    return Check(look, names)


def that_sets(*names: str) -> Check:
    """A class whose source speaks of these attributes."""

    def look(found: Any) -> str | None:
        if not isinstance(found, type):
            return f"is {type_of(found)}, not a class"
        source = inspect.getsource(found)
        lacking = [name for name in names if not re.search(rf"\b{name}\b", source)]
        return f"has no attribute {', '.join(lacking)}" if lacking else None

    return Check(look, names)


def _names(found: type) -> set[str]:
    return {each.__name__ for each in found.__mro__}


def differences(group: Group) -> Iterator[str]:
    """What of ``group`` is not as expected, in words. Imports its modules."""
    for module, names in group.items():
        for name, check in names.items():
            try:
                found: Any = importlib.import_module(module)
                for part in name.split("."):
                    found = getattr(found, part)
            except (ImportError, AttributeError):
                yield f"{module}.{name} is not there"
            except Exception as error:
                yield f"{module}.{name} cannot be imported ({type(error).__name__}: {error})"
            else:
                if wrong := check(found):
                    yield f"{module}.{name} {wrong}"


def served_dense(what: str) -> OrthoRankError:
    """The error of a step that ``what`` keeps from saying which of its tokens are prompt."""
    return OrthoRankError(
        f"{what}: its prompts would be served dense; this package is tested with vLLM {TESTED}: use that, or serve the "
        "model without a plan"
    )


def expect(thing: Any, **attributes: Expected) -> None:
    """Before attributes of an object of vLLM are used: they are there, of these types, or pass these checks.

    Raises:
        OrthoRankError: one is not.

    Example:
        >>> expect(complex(1, 2), real=float)
        >>> expect(complex(1, 2), real=int)
        Traceback (most recent call last):
        orthorank.common.errors.OrthoRankError: vLLM's complex has real of type float, and OrthoRank needs int; it is \
tested with vLLM 0.32
    """
    owner = thing.__name__ if isinstance(thing, type) else type(thing).__name__
    for name, wanted in attributes.items():
        kinds = () if isinstance(wanted, Check) else wanted if isinstance(wanted, tuple) else (wanted,)
        words = " or ".join(each.__name__ for each in kinds)
        if not hasattr(thing, name):
            if isinstance(wanted, Check) and wanted.optional:
                continue
            raise OrthoRankError(
                f"vLLM's {owner} has no {name}, and OrthoRank needs it{f', of type {words}' if words else ''}; it is "
                f"tested with vLLM {TESTED}"
            )
        found = getattr(thing, name)
        if isinstance(wanted, Check):
            if wrong := wanted(found):
                raise OrthoRankError(f"vLLM's {owner} has a {name} that {wrong}; it is tested with vLLM {TESTED}")
        elif not isinstance(found, kinds):
            raise OrthoRankError(
                f"vLLM's {owner} has {name} of type {type(found).__name__}, and OrthoRank needs "
                f"{words}; it is tested with vLLM {TESTED}"
            )
