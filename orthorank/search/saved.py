"""Checks of what a file says before a search goes on from it. A ValueError means that no search has written it."""

import math
from collections.abc import Collection
from typing import Any


def check_layers(layers: Any, among: Collection[int] | None = None) -> None:
    """A list of layer numbers, none of them twice, all of them in ``among``."""
    if not isinstance(layers, list) or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ValueError
    if len(set(layers)) < len(layers) or (among is not None and not set(layers) <= set(among)):
        raise ValueError


def check_losses(losses: Any, among: Collection[int]) -> None:
    """Finite numbers by layer, or None where one was given up.

    >>> check_losses({12: 3.5, 13: None}, [12, 13])
    >>> check_losses({12: "3.5"}, [12, 13])
    Traceback (most recent call last):
        ...
    ValueError
    """
    if not isinstance(losses, dict) or not set(losses) <= set(among):
        raise ValueError
    check_numbers([loss for loss in losses.values() if loss is not None])


def check_numbers(numbers: Any) -> None:
    """A list of finite numbers."""
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError


def check_size(size: Any) -> None:
    """An integer above 0, or None for "not known"."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError
