"""Names that a room hands on and imports when they are first asked for: torch takes seconds, and a command line should
check its options, and stop, before that."""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def exports(package: str, homes: Mapping[str, tuple[str, ...]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package``.

    Args:
        package: its ``__name__``; homes: the modules that its names are in, and which.

    A name that is a submodule's, too, cannot be handed on like this: importing that would put the module in its place.

    >>> __getattr__, __dir__ = exports(__name__, {"string": ("ascii_lowercase", "digits")})
    >>> __getattr__("digits")
    '0123456789'
    """
    names = {name: home for home, found in homes.items() for name in found}

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(names[name]), name)
        vars(sys.modules[package])[name] = value
        return value

    return find, lambda: sorted({*vars(sys.modules[package]), *names})
