"""Replacing a method of one object, so that it can be undone, deep-copied and pickled."""

from collections.abc import Callable
from typing import Any

from orthorank.errors import OrthoRankError


class Patch:
    """A callable that stands in an object's ``__dict__`` in place of one of its methods.

    Deep copies and pickles of the object carry a patch that belongs to the copy, since a patch is an ordinary object
    that refers to its owner. ``accelerate`` keeps a hooked module's own forward in ``_old_forward`` and calls it
    between moving inputs and weights; there the patch takes that place.

    Args:
        owner: the object; name: its method.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.owner = owner
        self.name = "_old_forward" if name == "forward" and "_old_forward" in owner.__dict__ else name
        self.replaced = owner.__dict__.get(self.name)
        owner.__dict__[self.name] = self

    @property
    def original(self) -> Callable[..., Any]:
        """The method as it was."""
        if self.replaced is not None:
            return self.replaced
        return getattr(type(self.owner), self.name).__get__(self.owner)

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method as it was, where `inspect.signature` looks for it."""
        return self.original

    def undo(self) -> None:
        """Put the original back, the identical object."""
        self.check_on_top()
        if self.replaced is None or self.name not in self._names():
            del self.owner.__dict__[self._names()[0]]
        else:
            self.owner.__dict__[self.name] = self.replaced

    def check_on_top(self) -> None:
        """Nobody replaced the method after this patch, else undoing would lose that replacement."""
        if not self._names():
            raise OrthoRankError(
                f"{type(self.owner).__name__}.{self.name} was replaced again after the plan was applied; undo that "
                "replacement first, then call handle.remove()"
            )

    def _names(self) -> list[str]:
        """Where this patch stands now. Taking an ``accelerate`` hook off moves it from one name to the other."""
        names = {self.name, "forward"} if self.name == "_old_forward" else {self.name}
        return [name for name in sorted(names) if self.owner.__dict__.get(name) is self]
