"""The plan: which layers select tokens, how many, by which score. A small JSON file that people can share."""

import dataclasses
import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.errors import OrthoRankError
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_NAME = "orthorank.json"
LEGAL: dict[str, tuple[str, ...]] = {
    "criterion": ("orthogonal", "inverse"),
    "select": ("topk",),
    "kv": ("all",),
    "decode": ("dense",),
}


@dataclass
class OrthoRankConfig:
    """A plan for one model (paper, section 3.2).

    Args:
        layers: decoder layers that select tokens, counted from 0. Sorted and without repeats once stored.
        keep_ratio: share of each sequence's valid tokens that a selected layer updates, 0 to 1. 0 removes the layer
            (layer pruning), 1 leaves it dense. The paper's "33 %" is 1/3.
        criterion: ``"orthogonal"`` selects the tokens whose normalised state is most orthogonal to the sink token's
            (equation 4); ``"inverse"`` the least orthogonal ones, the paper's counter-example (Figure 4).
        keep_last: tokens at the end of a prompt that `generate()` always updates, counted inside ``keep_ratio``; their
            logits start the answer. Calls of the model outside `generate()` use 0, as the paper does.
        decode: ``"dense"``: generated tokens pass every layer (except removed ones).
        select: ``"topk"``: exactly the ``floor(keep_ratio * tokens)`` best tokens of a sequence (or prefill chunk).
        kv: ``"all"``: a selected layer computes keys and values of all tokens.
        model_id, model_revision, model_type, num_hidden_layers, hidden_size: the model the plan was made for; `apply`
            refuses another one. None means "not stated" and is not checked.
        sink_layer: the layer after which the sink token's state was found to form.
        calibration: what the layers were chosen on (text hash, tokens, windows, loss, method).
        measured: figures measured with this plan.
        version: version of this package that wrote the plan.

    Raises:
        OrthoRankError: a field holds an illegal value; the message lists what is legal.

    Example:
        >>> plan = OrthoRankConfig(layers=[14, 12], keep_ratio=1/3)
        >>> plan.layers
        [12, 14]
        >>> round(plan.nominal_sparsity(30), 4)
        0.0444
    """

    layers: list[int]
    keep_ratio: float = 1 / 3
    criterion: str = "orthogonal"
    keep_last: int = 1
    decode: str = "dense"
    select: str = "topk"
    kv: str = "all"
    model_id: str | None = None
    model_revision: str | None = None
    model_type: str | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    sink_layer: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        if isinstance(self.keep_ratio, bool) or not isinstance(self.keep_ratio, int | float):
            raise OrthoRankError(f"keep_ratio is {self.keep_ratio!r}; it must be a number from 0 to 1, such as 1/3")
        if not 0 <= self.keep_ratio <= 1:  # NaN fails this, too
            raise OrthoRankError(
                f"keep_ratio is {self.keep_ratio}; it must be from 0 (remove the layer) to 1 (dense), such as 1/3"
            )
        self.keep_ratio = float(self.keep_ratio)
        _check_integer("keep_last", self.keep_last, 0)
        for name in ("num_hidden_layers", "hidden_size"):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1)
        self.layers = _checked_layers(self.layers, self.num_hidden_layers)
        if self.sink_layer is not None:
            _check_integer("sink_layer", self.sink_layer, 0)
        for name in ("calibration", "measured"):
            if not isinstance(getattr(self, name), dict):
                raise OrthoRankError(f"{name} is {getattr(self, name)!r}; it must be a mapping")
        for name in ("model_id", "model_revision", "model_type", "version"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str)) or (name == "version" and value is None):
                raise OrthoRankError(f"{name} is {value!r}; it must be a string")
        for name, legal in LEGAL.items():
            if getattr(self, name) not in legal:
                raise OrthoRankError(f"{name} is {getattr(self, name)!r}; it may be {' or '.join(map(repr, legal))}")

    def nominal_sparsity(self, num_hidden_layers: int | None = None) -> float:
        """Share of token-layer updates that are left out: ``len(layers) * (1 - keep_ratio) / num_hidden_layers``."""
        total = num_hidden_layers or self.num_hidden_layers
        if not total:
            raise OrthoRankError("num_hidden_layers is not stated in the plan; pass it as an argument")
        return len(self.layers) * (1 - self.keep_ratio) / total

    @classmethod
    def for_model(cls, model: "PreTrainedModel", **fields: Any) -> "OrthoRankConfig":
        """A plan with the model's fields filled in from ``model``; ``fields`` as for the class."""
        config = model.config.get_text_config()
        fields.setdefault("model_id", hub_id(model))
        fields.setdefault("model_revision", getattr(model.config, "_commit_hash", None))
        fields.setdefault("model_type", config.model_type)
        fields.setdefault("num_hidden_layers", config.num_hidden_layers)
        fields.setdefault("hidden_size", config.hidden_size)
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON stores them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OrthoRankConfig":
        """The plan in ``values``. Keys that this version does not know are ignored with a warning."""
        if not isinstance(values, dict):
            raise OrthoRankError(f"a plan is a JSON object, not {type(values).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(values) - known):
            warnings.warn(
                f"this plan (written by version {values.get('version', 'unknown')}) has keys that version "
                f"{__version__} does not know and ignores: {', '.join(unknown)}; a newer version may follow them",
                stacklevel=3,
            )
        if "layers" not in values:
            raise OrthoRankError("the plan has no key 'layers'; it must list the layers that select tokens")
        return cls(**{k: v for k, v in values.items() if k in known})

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``folder/orthorank.json`` (sorted keys, replaced in one step) and return its path."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / FILE_NAME
            part = path.with_suffix(f".{os.getpid()}.part")
            part.write_text(json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise OrthoRankError(f"the plan cannot be written to {folder}: {error.strerror}") from error
        return path

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> "OrthoRankConfig":
        """Read a plan from a JSON file, or from ``orthorank.json`` in a folder."""
        file = Path(path)
        file = file / FILE_NAME if file.is_dir() else file
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise OrthoRankError(f"no plan can be read at {file}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise OrthoRankError(f"{file} is not a JSON file: {error}") from error
        try:
            return cls.from_dict(values)
        except OrthoRankError as error:
            raise OrthoRankError(f"{file}: {error}") from error


def hub_id(model: "PreTrainedModel") -> str | None:
    """The hub id that ``model`` was loaded from, or None when it came from a folder or was made from a config."""
    name = getattr(model.config, "_name_or_path", "") or ""
    looks_like_hub_id = name.count("/") <= 1 and not name.startswith((".", "~", os.sep)) and not os.path.exists(name)
    return name if name and looks_like_hub_id else None


def _check_integer(name: str, value: object, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise OrthoRankError(f"{name} is {value!r}; it must be an integer, {minimum} or more")


def _checked_layers(layers: object, total: int | None) -> list[int]:
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
