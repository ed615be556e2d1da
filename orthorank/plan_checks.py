"""What a plan's fields may hold; each error names the field, what it was, and what it may be."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from orthorank.errors import OrthoRankError

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

LEGAL: dict[str, tuple[str, ...]] = {
    "criterion": ("orthogonal", "inverse", "random", "cosine", "prenorm"),
    "select": ("topk", "window", "threshold"),
    "kv": ("all", "selected"),
    "sinks": ("first", "auto"),
    "decode": ("dense", "threshold"),
}


def check_fields(plan: "OrthoRankConfig") -> None:
    """Check every field of ``plan``, and bring layers, ratios and thresholds into their stored form.

    Raises:
        OrthoRankError: a field holds an illegal value, or two fields exclude each other.
    """
    plan.keep_ratio = _ratio("keep_ratio", plan.keep_ratio)
    check_integer("keep_last", plan.keep_last, 0)
    check_integer("seed", plan.seed, 0)
    for name in ("num_hidden_layers", "hidden_size", "select_window"):
        if getattr(plan, name) is not None:
            check_integer(name, getattr(plan, name), 1)
    plan.layers = _layers(plan.layers, plan.num_hidden_layers)
    if plan.sink_layer is not None:
        check_integer("sink_layer", plan.sink_layer, 0)
    if not isinstance(plan.update_sink, bool):
        raise OrthoRankError(f"update_sink is {plan.update_sink!r}; it must be True or False")
    for name in ("calibration", "measured"):
        if not isinstance(getattr(plan, name), dict):
            raise OrthoRankError(f"{name} is {getattr(plan, name)!r}; it must be a mapping")
    for name in ("model_id", "model_revision", "model_type", "version"):
        value = getattr(plan, name)
        if not (value is None or isinstance(value, str)) or (name == "version" and value is None):
            raise OrthoRankError(f"{name} is {value!r}; it must be a string")
    for name, legal in LEGAL.items():
        if getattr(plan, name) not in legal:
            raise OrthoRankError(f"{name} is {getattr(plan, name)!r}; it may be {' or '.join(map(repr, legal))}")
    plan.keep_ratios = {
        layer: _ratio(f"keep_ratios[{layer}]", ratio) for layer, ratio in _by_layer("keep_ratios", plan).items()
    }
    plan.thresholds = {
        layer: _threshold(f"thresholds[{layer}]", tau) for layer, tau in _by_layer("thresholds", plan).items()
    }
    _check_modes(plan)


def check_integer(name: str, value: object, minimum: int) -> None:
    """``value`` is an int, not a bool, of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OrthoRankError(f"{name} is {value!r}; it must be an integer, {minimum} or more")


def _check_modes(plan: "OrthoRankConfig") -> None:
    """The fields of each way to select are there when it is chosen, and only then."""
    if plan.select == "window" and plan.select_window is None:
        raise OrthoRankError("select is 'window' and select_window is None; give the tokens of a window, such as 256")
    if plan.select != "window" and plan.select_window is not None:
        raise OrthoRankError(
            f"select_window is {plan.select_window} and select is {plan.select!r}; it is for select='window': set "
            "that, or select_window to None"
        )
    if plan.select == "threshold":
        if missing := [layer for layer in plan.selecting if layer not in plan.thresholds]:
            raise OrthoRankError(
                f"select is 'threshold' and thresholds has none for layer {', '.join(map(str, missing))}; find them "
                "with `orthorank calibrate`"
            )
        return
    for name, idle in (("thresholds", bool(plan.thresholds)), ("decode", plan.decode == "threshold")):
        if idle:
            raise OrthoRankError(
                f"{name} is {getattr(plan, name)!r} and select is {plan.select!r}; it is for select='threshold': set "
                f"that, or leave {name} out"
            )


def _ratio(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OrthoRankError(f"{name} is {value!r}; it must be a number from 0 to 1, such as 1/3")
    if not 0 <= value <= 1:  # NaN fails this, too
        raise OrthoRankError(f"{name} is {value}; it must be from 0 (remove the layer) to 1 (dense), such as 1/3")
    return float(value)


def _threshold(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise OrthoRankError(f"{name} is {value!r}; it must be a finite number: tokens that score less are selected")
    return float(value)


def _layers(layers: object, total: int | None) -> list[int]:
    if not isinstance(layers, list | tuple | range | set) or not all(type(i) is int for i in layers):
        raise OrthoRankError(f"layers is {layers!r}; it must be a list of layer numbers, counted from 0")
    ordered = sorted(layers)
    if ordered and ordered[0] < 0:
        raise OrthoRankError(f"layers holds {ordered[0]}; layers are counted from 0")
    if total is not None and ordered and ordered[-1] >= total:
        raise OrthoRankError(f"layers holds {ordered[-1]}; the model has layers 0 to {total - 1}")
    if len(set(ordered)) != len(ordered):
        raise OrthoRankError(f"layers is {list(layers)}; a layer is listed twice")
    return ordered


def _by_layer(name: str, plan: "OrthoRankConfig") -> dict[int, Any]:
    """The field ``name``, a mapping from layers of the plan, with its keys as ints and sorted."""
    given = getattr(plan, name)
    if not isinstance(given, Mapping):
        raise OrthoRankError(f"{name} is {given!r}; it must be a mapping from layer numbers")
    found: dict[int, Any] = {}
    for key, value in given.items():
        layer = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() else key
        if type(layer) is not int or layer not in plan.layers:
            raise OrthoRankError(f"{name} has the key {key!r}; its keys must be among the plan's layers, {plan.layers}")
        if layer in found:
            raise OrthoRankError(f"{name} has the key {layer} twice, as a number and as a string")
        found[layer] = value
    return dict(sorted(found.items()))
