"""What maps were fitted on: a sample of the weights, the adapters that were active, and the model's licence."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from orthorank.config import OrthoRankConfig, hub_id
from orthorank.families.known import layers_of, unwrapped
from orthorank_kernels.callers import levels_to_caller

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAMPLED = 256  # weights
_SCHEME = "bf16:"  # a fingerprint that begins with something else is not compared
_STEP = 2.0**-7  # of a number, at most, from one number of bfloat16 to the next
_SMALLEST = 2.0**-24  # of float16
_OTHERS = 1 / 8  # of a sample may be a step off: a model of float32 that is loaded as float16 is rounded twice
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PLAIN = (Tensor, nn.Parameter)


def provenance(model: "PreTrainedModel") -> dict[str, Any]:
    """What a plan records of the model that its maps are fitted on."""
    return {
        "model_fingerprint": weights_fingerprint(model),
        "adapters": active_adapters(model),
        "model_license": license_of(model),
    }


def weights_fingerprint(model: Any) -> str:
    """A sample of the layers' weights, rounded to bfloat16: alike for a model in any dtype, other for its fine-tunes.

    It reads 256 numbers, however large the model is. Weights that cannot be read as numbers (quantised, sharded over
    processes, offloaded, or merged with an adapter) are left open, and compared with nothing.
    """
    layers = layers_of(model)
    sharded = getattr(unwrapped(model), "tp_size", None) is not None
    weights = [_weights(layer) for layer in layers]
    sample = []
    for number in range(SAMPLED):
        of_layer = weights[number * len(layers) // SAMPLED]
        weight = of_layer[number % len(of_layer)]
        if weight is None or sharded or not _readable(weight):
            sample.append(math.nan)
        else:
            sample.append(float(weight.detach().reshape(-1)[number * 2654435761 % weight.numel()]))
    bits = torch.tensor(sample).to(torch.bfloat16).view(torch.int16).tolist()
    return _SCHEME + "".join(f"{each & 0xFFFF:04x}" for each in bits)


def differing(one: object, other: object) -> tuple[int, int] | None:
    """How many of the weights that both fingerprints know differ, and how many those are; None: not comparable.

    >>> differing("bf16:3f803f80", "bf16:3f804000"), differing("bf16:3f80", "0123456789abcdef")
    ((1, 2), None)
    """
    if not (isinstance(one, str) and isinstance(other, str)) or len(one) != len(other):
        return None
    if not (one.startswith(_SCHEME) and other.startswith(_SCHEME)):
        return None
    try:
        first, second = (_numbers(each.removeprefix(_SCHEME)) for each in (one, other))
    except ValueError:  # no fingerprint of ours
        return None
    known = ~(first.isnan() | second.isnan())
    first, second = first[known], second[known]
    apart = (first - second).abs()
    far = apart > _STEP * torch.maximum(first.abs(), second.abs()) + _SMALLEST
    off = int((first != second).sum())
    return (off if bool(far.any()) or off > _OTHERS * len(first) else 0), len(first)


def active_adapters(model: Any) -> list[str]:
    """The names of PEFT's adapters that act on the model, merged into its weights or beside them."""
    names: set[str] = set()
    for module in unwrapped(model).modules():
        if hasattr(module, "base_layer"):
            names.update(getattr(module, "merged_adapters", ()))
            if not getattr(module, "disable_adapters", False):
                names.update(getattr(module, "active_adapters", ()))
    return sorted(names)


def license_of(model: "PreTrainedModel") -> str | None:
    """What the model's config says, or its card, if that is in its folder or in the local cache of the Hub."""
    from huggingface_hub import metadata_load, try_to_load_from_cache
    from yaml import YAMLError

    if isinstance(told := getattr(model.config, "license", None), str):
        return told
    name = getattr(model.config, "_name_or_path", "") or ""
    try:
        card: Any = Path(name, "README.md")
        if (repo := hub_id(model)) is not None:
            card = try_to_load_from_cache(repo, "README.md", revision=getattr(model.config, "_commit_hash", None))
        if not name or not isinstance(card, (str, Path)) or not Path(card).is_file():
            return None
        about = metadata_load(card) or {}
    except (OSError, ValueError, YAMLError):  # a card without a head, or with a broken one
        return None
    found = about.get("license_name") or about.get("license")
    return found if isinstance(found, str) else None


def warn_of_other_weights(model: Any, plan: OrthoRankConfig) -> None:
    """Warn where the maps of ``plan`` were fitted on other weights than the model's, or with other adapters."""
    record = plan.calibration.get("correction")
    if plan.correction is None or not isinstance(record, dict):
        return
    advice = "what they put back may be wrong; measure it, or fit maps on this model with orthorank.fit_correction"
    found = differing(record.get("model_fingerprint"), weights_fingerprint(model))
    if found is not None and found[0]:
        warnings.warn(
            "the plan's maps were fitted on other weights, of another fine-tune or rounded otherwise perhaps: "
            f"{found[0]} of {found[1]} that were compared differ; {advice}",
            stacklevel=levels_to_caller(),
        )
    then, now = record.get("adapters"), active_adapters(model)
    if isinstance(then, list) and bool(then) != bool(now):
        with_, here = (", ".join(map(str, names)) or "none" for names in (then, now))
        warnings.warn(
            f"the plan's maps were fitted with the adapters {with_}, and active here are {here}; {advice}",
            stacklevel=levels_to_caller(),
        )


def _readable(weight: Tensor) -> bool:
    """Whether the numbers are here: neither packed (quantised) nor elsewhere (offloaded, partitioned to nothing)."""
    return type(weight) in _PLAIN and weight.dtype in _FLOATS and weight.device.type != "meta" and weight.numel() > 0


def _weights(layer: Any) -> list[Tensor | None]:
    """The layer's own weights by name, as they are without adapters; None where one is merged."""
    adapted = [module for module in layer.modules() if hasattr(module, "base_layer")]
    of_adapters = {
        id(weight)
        for module in adapted
        for name, weight in module.named_parameters()
        if not name.startswith("base_layer.")
    }
    merged = {id(x) for module in adapted if getattr(module, "merged", False) for x in module.base_layer.parameters()}
    own = {
        name.replace("base_layer.", ""): None if id(weight) in merged else weight
        for name, weight in layer.named_parameters()
        if id(weight) not in of_adapters
    }
    return [own[name] for name in sorted(own)]


def _numbers(bits: str) -> Tensor:
    values = [int(bits[i : i + 4], 16) for i in range(0, len(bits), 4)]
    return (
        torch.tensor([value - 2**16 * (value >= 2**15) for value in values], dtype=torch.int16)
        .view(torch.bfloat16)
        .float()
    )
