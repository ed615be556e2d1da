"""Whose code a method is: a class's own, or what somebody put in its place."""

from functools import lru_cache
from typing import Any

import torch
from torch import nn

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
