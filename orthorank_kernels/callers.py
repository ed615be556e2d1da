"""Whose line a warning is about."""

import sys

RUNNERS = (__name__.partition(".")[0], "orthorank", "transformers", "accelerate", "peft", "torch")


def levels_to_caller() -> int:
    """``stacklevel`` for a `warnings.warn` of the function that asks: the first line outside of what runs a model.

    That is `orthorank_kernels`, `orthorank`, transformers, accelerate, PEFT, and PyTorch's modules.

    Example:
        >>> levels_to_caller() >= 1
        True
    """
    frame, levels = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in RUNNERS:
        frame, levels = frame.f_back, levels + 1
    return levels
