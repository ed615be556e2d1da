"""Methods of one object: replacing one, so that it can be undone, deep-copied and pickled; and whose code one is."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from orthorank.common.errors import OrthoRankError


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
        self.name = _place(owner) if name == "forward" else name
        self.replaced = owner.__dict__.get(self.name)
        owner.__dict__[self.name] = self

    @property
    def original(self) -> Callable[..., Any]:
        """The method as it was."""
        if self.replaced is not None:
            return self.replaced
        return getattr(type(self.owner), self.name).__get__(self.owner)

    def run_original(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method as it was. Compilers follow this; not every PyTorch's can follow how a method is bound."""
        if self.replaced is not None:
            return self.replaced(*args, **kwargs)
        return getattr(type(self.owner), self.name)(self.owner, *args, **kwargs)

    @property
    def __self__(self) -> Any:
        """The object, as a bound method says it: who moves methods to a shallow copy of the object goes by this."""
        return self.owner

    @property
    def __func__(self) -> Callable[..., Any]:
        """What a shallow copy of the object gets in place of the patch, which would run the object and not the copy."""
        return _refuse_copy

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The method as it was, where `inspect.signature` looks for it."""
        return self.original

    def undo(self) -> None:
        """Put the original back, the identical object."""
        self.check_on_top()
        if self._was_put_back():
            return
        if self.replaced is None or self.name not in self._names():
            del self.owner.__dict__[self._names()[0]]
        else:
            self.owner.__dict__[self.name] = self.replaced

    def check_on_top(self) -> None:
        """No other code has replaced the method after this patch, else undoing would lose that replacement."""
        if not self._names() and not self._was_put_back():
            raise OrthoRankError(
                f"{type(self.owner).__name__}.{self.name} was replaced again after the plan was applied; undo that "
                "replacement first, then call handle.remove()"
            )

    def _names(self) -> list[str]:
        """Where this patch stands now. Taking an ``accelerate`` hook off moves it from one name to the other."""
        names = {self.name, "forward"} if self.name == "_old_forward" else {self.name}
        return [name for name in sorted(names) if self.owner.__dict__.get(name) is self]

    def _was_put_back(self) -> bool:
        """Whether someone has put back what was there before the plan: the same object, or the class's method, bound.

        PEFT does so with `prepare_inputs_for_generation` after each `generate()` of a prompt method.
        """
        here = self.owner.__dict__.get(self.name)
        return here is not None and here is not self and bool(here == self.original)


def _refuse_copy(copied: Any, *args: Any, **kwargs: Any) -> Any:
    raise OrthoRankError(
        f"this {type(copied).__name__} is a shallow copy (by accelerate's compile_regions, for example) of one with a "
        "plan applied, which follows the plan and is not compiled; make it from the model without a plan, then apply "
        "the plan to what you get"
    )


def forward_of(module: Any) -> Any:
    """The forward of its own that ``module`` has in the place where a patch would go; None: it runs its class's."""
    return module.__dict__.get(_place(module))


def _place(module: Any) -> str:
    return "_old_forward" if "_old_forward" in module.__dict__ else "forward"


# Hooks of accelerate that move inputs and weights and change no value.
MOVERS = ("ModelHook", "AlignDevicesHook")


@lru_cache(maxsize=256)
def is_code_of(forward: Any, home: str) -> bool:
    """Whether ``forward`` is code of the module ``home``, wrapped by code of transformers at most.

    What a function says of itself (``__module__``) is copied by `functools.wraps`; where its code lies is not.

    Args:
        home: a module's name; empty: any.
    """
    while home:
        here = home_of(forward)
        if here == home and not hasattr(forward, "__wrapped__"):
            return True
        if not here.startswith("transformers.") or not hasattr(forward, "__wrapped__"):
            return False
        forward = forward.__wrapped__
    return True


def has_own_forward(module: Any) -> bool:
    """Whether calling ``module`` runs its class's forward, maybe between accelerate's moves of inputs and weights."""
    own = vars(module)
    forward = own.get("forward")
    if forward is None or is_bound(forward, module):  # accelerate leaves it like that when it takes its hook off
        return True
    return (
        home_of(forward) == "accelerate.hooks"
        and _only_moves(own.get("_hf_hook"))
        and is_bound(own.get("_old_forward"), module)
    )


def _only_moves(hook: Any) -> bool:
    kind = type(hook)
    if kind.__module__ != "accelerate.hooks":
        return False
    return all(map(_only_moves, hook.hooks)) if kind.__name__ == "SequentialHook" else kind.__name__ in MOVERS


def is_bound(function: Any, module: nn.Module) -> bool:
    """Whether ``function`` is the forward of the class of ``module``, bound to it."""
    bound_to, code = getattr(function, "__self__", None), getattr(function, "__func__", None)
    return bound_to is module and code is type(module).forward


def _code(function: Any) -> Any:
    """The function inside a partial or a bound method."""
    while (inner := getattr(function, "func", None) or getattr(function, "__func__", None)) is not None:
        function = inner
    return function


def home_of(function: Any) -> str:
    """The module in which the code of ``function`` lies."""
    function = _code(function)
    found = getattr(function, "__globals__", None)
    return found.get("__name__", "") if isinstance(found, dict) else type(function).__module__ + "."


def name_of(function: Any) -> str:
    code = _code(function)
    if not hasattr(code, "__qualname__"):
        code = type(code)
    return f"{code.__qualname__} of {home_of(function).rstrip('.') or code.__module__}"


def not_compiled(module: Any) -> Any:
    """The module inside, if ``module`` is what `torch.compile` puts around one.

    What accelerate's ``compile_regions`` returns is not: it has layers of its own, and only remembers the other model.
    """
    inside = getattr(module, "_modules", {}).get("_orig_mod")
    return module if inside is None else inside


def is_changed(module: Any) -> bool:
    """Whether calling ``module`` runs more, or something else, than its class says."""
    return "forward" in vars(module) or has_hooks(module)


def has_hooks(module: Any) -> bool:
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


@torch.compiler.assume_constant_result
def is_code_of_class(kind: Any, home: str) -> bool:
    """`is_code_of` for the forward of a class, which a compiled graph takes as it is."""
    return is_code_of(kind.forward, home)
