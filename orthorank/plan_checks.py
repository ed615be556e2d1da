"""What a plan's fields may hold; each error names the field, what it was, and what it may be."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from orthorank.common.criteria import check_criterion, check_pointwise
from orthorank.common.errors import OrthoRankError, check_integer, shown, type_of

LEGAL: dict[str, tuple[str, ...]] = {
    "select": ("topk", "window", "threshold"),
    "kv": ("all", "selected"),
    "sinks": ("first", "auto"),
    "decode": ("dense", "threshold"),
}
MOST = {
    "keep_last": 2**23,  # as many as the kernels can force
    "min_prompt": 2**30,
    "keep_multiple": 2**20,
    "select_window": 2**30,  # as many tokens as a selection takes
    "seed": 2**63 - 1,
    "num_hidden_layers": 10**6,
    "hidden_size": 10**9,
    "sink_layer": 10**6,
}
RECORDS = ("calibration", "measured")
FILE_NAME = "orthorank.json"
MOST_JSON = 2**20  # bytes of it
_VERSION = re.compile(r"\d+(\.\d+)*", re.ASCII)


def check_fields(plan: Any) -> None:
    """Check every field of ``plan``, and bring layers, ratios and thresholds into their stored form.

    Raises:
        OrthoRankError: a field holds an illegal value, or two fields exclude each other.
    """
    plan.keep_ratio = _ratio("keep_ratio", plan.keep_ratio)
    check_integer("keep_last", plan.keep_last, 0, MOST["keep_last"])
    check_integer("min_prompt", plan.min_prompt, 0, MOST["min_prompt"])
    check_integer("keep_multiple", plan.keep_multiple, 1, MOST["keep_multiple"])
    check_integer("seed", plan.seed, 0, MOST["seed"])
    for name in ("num_hidden_layers", "hidden_size", "select_window"):
        if getattr(plan, name) is not None:
            check_integer(name, getattr(plan, name), 1, MOST[name])
    plan.layers = _layers(plan.layers, plan.num_hidden_layers)
    if plan.sink_layer is not None:
        check_integer("sink_layer", plan.sink_layer, 0, MOST["sink_layer"])
    if not isinstance(plan.update_sink, bool):
        raise OrthoRankError(f"update_sink is {shown(plan.update_sink)}; it must be True or False")
    for name in RECORDS:
        if not isinstance(getattr(plan, name), dict):
            raise OrthoRankError(f"{name} is {shown(getattr(plan, name))}; it must be a mapping")
        _check_record(name, getattr(plan, name))
    for name in ("model_id", "model_revision", "model_type", "version"):
        value = getattr(plan, name)
        if not (value is None or isinstance(value, str)) or (name == "version" and value is None):
            raise OrthoRankError(f"{name} is {shown(value)}; it must be a string")
    release_of(plan.version)
    check_criterion(plan.criterion)
    for name, legal in LEGAL.items():
        if getattr(plan, name) not in legal:
            raise OrthoRankError(f"{name} is {shown(getattr(plan, name))}; it may be {' or '.join(map(repr, legal))}")
    plan.keep_ratios = {
        layer: _ratio(f"keep_ratios[{layer}]", ratio) for layer, ratio in _by_layer("keep_ratios", plan).items()
    }
    plan.thresholds = {
        layer: _threshold(f"thresholds[{layer}]", tau) for layer, tau in _by_layer("thresholds", plan).items()
    }
    _check_modes(plan)
    if plan.correction is not None:
        _check_correction(plan)


def release_of(version: str) -> tuple[int, ...]:
    """The numbers of a version.

    >>> release_of("0.10.1rc2")
    (0, 10, 1)
    """
    if (found := _VERSION.match(version)) is None or len(version) > 100:
        raise OrthoRankError(
            f"version is {shown(version[:100])}; it must be a version of this package, such as '0.1.0'"
        )
    return tuple(map(int, found[0].split(".")))


def _check_record(name: str, value: object) -> None:
    """What JSON gives back as it is: names as keys, and numbers, strings, lists and mappings of such."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise OrthoRankError(f"{name} has the key {shown(key)}; keys must be strings, such as {str(key)!r}")
            _check_record(f"{name}[{key!r}]", item)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_record(f"{name}[{number}]", item)
    elif isinstance(value, int) and value.bit_length() > 1024:
        raise OrthoRankError(f"{name} is {shown(value)}; more than a file can hold")
    elif not (value is None or isinstance(value, (int, float, str))):
        raise OrthoRankError(
            f"{name} is {type_of(value)}; a plan's records hold numbers, strings, lists and mappings, and null"
        )


def _check_modes(plan: Any) -> None:
    """The fields of each way to select are there when it is chosen, and only then."""
    if plan.select == "window" and plan.select_window is None:
        raise OrthoRankError("select is 'window' and select_window is None; give the tokens of a window, such as 256")
    if plan.select != "window" and plan.select_window is not None:
        raise OrthoRankError(
            f"select_window is {plan.select_window} and select is {plan.select!r}; it is for select='window': set "
            "that, or select_window to None"
        )
    if plan.select != "topk" and plan.keep_multiple != 1:
        raise OrthoRankError(
            f"keep_multiple is {plan.keep_multiple} and select is {plan.select!r}; it is for select='topk': set that, "
            "or keep_multiple to 1"
        )
    if plan.min_prompt and plan.kv == "selected":
        raise OrthoRankError(
            f"min_prompt is {plan.min_prompt} and kv is 'selected', an ablation without a cache; set min_prompt to 0"
        )
    if plan.min_prompt and plan.decode == "threshold":
        raise OrthoRankError(
            f"min_prompt is {plan.min_prompt} and decode is 'threshold', which selects generated tokens whatever the "
            "prompt; set decode to 'dense', or min_prompt to 0"
        )
    if plan.select == "threshold":
        check_pointwise(plan.criterion, "select='threshold'; use 'topk' or 'window'")
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


def _check_correction(plan: Any) -> None:
    """Every map is of a layer that leaves tokens out, and of the model's hidden size."""
    from orthorank.correction import FILE_NAME as MAPS_NAME  # plans without maps do without it
    from orthorank.correction import Correction

    correction = plan.correction
    if isinstance(correction, dict):
        raise OrthoRankError(
            f"correction is what a plan's JSON says of the maps in {MAPS_NAME} beside it, without the maps; read the "
            "plan with OrthoRankConfig.from_pretrained(folder), or take the key out to follow it uncorrected"
        )
    if not isinstance(correction, Correction):
        raise OrthoRankError(f"correction is {type_of(correction)}; it must be a Correction or None")
    check_maps(plan, correction.layers, correction.hidden_size)


def check_maps(plan: Any, layers: list[int], hidden_size: int) -> None:
    """Maps of ``layers`` and ``hidden_size`` would be the plan's.

    Raises:
        OrthoRankError: a layer leaves no token out, or the hidden size is another model's.
    """
    if wrong := [layer for layer in layers if layer not in plan.layers or plan.ratio(layer) == 1]:
        leaving = [layer for layer in plan.layers if plan.ratio(layer) < 1]
        raise OrthoRankError(
            f"correction has a map for layer {wrong[0]}, which leaves no token out; the layers that do are "
            f"{shown(leaving)}"
        )
    if plan.hidden_size not in (None, hidden_size):
        raise OrthoRankError(
            f"correction has maps of hidden size {hidden_size}, and hidden_size is {plan.hidden_size}; they "
            "are another model's"
        )


def misfits(plan: Any, config: Any) -> Iterator[str]:
    """Why ``plan`` is not of the model with that ``config`` (of its text part), as far as the plan says."""
    for name in ("num_hidden_layers", "hidden_size", "model_type"):
        wanted, found = getattr(plan, name), getattr(config, name)
        if wanted is not None and wanted != found:
            yield (
                f"the plan was made for a model with {name} {wanted!r} and this one has {found!r}; find a plan for "
                "this model with a search"
            )
    if plan.correction is not None and plan.correction.hidden_size != config.hidden_size:
        yield (
            f"the plan's correction has maps of hidden size {plan.correction.hidden_size}, and the model's is "
            f"{config.hidden_size}: it was fitted on another model; fit one on this model with orthorank.fit_correction"
        )
    if plan.layers and plan.layers[-1] >= config.num_hidden_layers:
        yield f"layers holds {plan.layers[-1]}; the model has layers 0 to {config.num_hidden_layers - 1}"


def _ratio(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise OrthoRankError(f"{name} is {shown(value)}; it must be a number from 0 to 1, such as 1/3")
    if not 0 <= value <= 1:  # NaN fails this, too
        raise OrthoRankError(
            f"{name} is {shown(value)}; it must be from 0 (remove the layer) to 1 (dense), such as 1/3"
        )
    return float(value)


def _threshold(name: str, value: object) -> float:
    try:
        tau = math.nan if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)
    except OverflowError:  # an integer that no float is as large as
        tau = math.inf
    if not math.isfinite(tau):
        raise OrthoRankError(
            f"{name} is {shown(value)}; it must be a finite number: tokens that score less are selected"
        )
    return tau


def _layers(layers: object, total: int | None) -> list[int]:
    if not isinstance(layers, (list, tuple, range, set)) or not all(type(i) is int for i in layers):
        raise OrthoRankError(f"layers is {shown(layers)}; it must be a list of layer numbers, counted from 0")
    ordered = sorted(layers)
    if ordered and ordered[0] < 0:
        raise OrthoRankError(f"layers holds {shown(ordered[0])}; layers are counted from 0")
    if ordered and ordered[-1] >= (total or MOST["num_hidden_layers"]):
        model = f"the model has layers 0 to {total - 1}" if total else "no model has as many layers"
        raise OrthoRankError(f"layers holds {shown(ordered[-1])}; {model}")
    if len(set(ordered)) != len(ordered):
        raise OrthoRankError(f"layers is {shown(list(layers))}; a layer is listed twice")
    return ordered


def _by_layer(name: str, plan: Any) -> dict[int, Any]:
    """The field ``name``, a mapping from layers of the plan, with its keys as ints and sorted."""
    given = getattr(plan, name)
    if not isinstance(given, Mapping):
        raise OrthoRankError(f"{name} is {shown(given)}; it must be a mapping from layer numbers")
    found: dict[int, Any] = {}
    for key, value in given.items():
        layer = int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 9 else key
        if type(layer) is not int or layer not in plan.layers:
            raise OrthoRankError(
                f"{name} has the key {shown(key)}; its keys must be among the plan's layers, {shown(plan.layers)}"
            )
        if layer in found:
            raise OrthoRankError(f"{name} has the key {layer} twice, as a number and as a string")
        found[layer] = value
    return dict(sorted(found.items()))


def json_of(values: dict[str, Any]) -> str:
    """``values`` as a plan's file holds them.

    Raises:
        OrthoRankError: that is larger than what is read.
    """
    text = json.dumps(values, indent=2, sort_keys=True) + "\n"
    if len(text) > MOST_JSON:  # ASCII, so these are bytes
        raise OrthoRankError(
            f"the plan has {len(text):,} bytes as JSON, and may have {MOST_JSON:,}; shorten its records, calibration "
            "and measured"
        )
    return text
