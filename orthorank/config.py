"""The plan: which layers select tokens, how many, by which score. A small JSON file that people can share."""

import dataclasses
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, UnknownKeysWarning, check_integer, check_share, shown
from orthorank.common.files import finite, user_path, write_text
from orthorank.plan_checks import FILE_NAME, RECORDS, check_fields, check_maps, json_of, release_of
from orthorank_kernels._version import __version__
from orthorank_kernels.callers import levels_to_caller

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from orthorank.correction import Correction

SPARSITY = 0.1  # nominal, where nothing else is said: of searches, and of the shipped plan that is taken
_ROUNDING = 1e-6  # repairs products such as 30 * 0.2 / (2 / 3), which may fall just below 9
BY_LAYER = ("keep_ratios", "thresholds")  # mappings from layer numbers, whose keys JSON makes strings


@dataclass
class OrthoRankConfig:
    """A plan for one model (paper, section 3.2).

    Args:
        layers: decoder layers that select tokens, counted from 0. Sorted and without repeats once stored.
        keep_ratio: share of each sequence's valid tokens that a selected layer updates, 0 to 1. 0 removes the layer
            (layer pruning), 1 leaves it dense. The paper's "33 %" is 1/3.
        keep_ratios: exceptions from ``keep_ratio`` for some of ``layers``, by layer number.
        keep_multiple: with ``select="topk"``: round the number of tokens that a selected layer updates up to a multiple
            of this, as far as a sequence has tokens. Matrix products on a GPU take as long for 682 rows as for 768, so
            64 or 128 updates more tokens in about the same time.
        criterion: ``"orthogonal"`` selects the tokens whose normalised state is most orthogonal to the sink token's
            (equation 4); ``"inverse"`` the least orthogonal ones, the paper's counter-example (Figure 4); ``"random"``
            any, by a hash of seed, layer and position; ``"cosine"`` by the angle alone; ``"prenorm"`` by the states
            before the norm (Table 3); or the name of one of your own (`orthorank.register_criterion`).
        seed: of ``criterion="random"``.
        keep_last: tokens at the end of a prompt that `generate()` always updates, counted inside ``keep_ratio``; their
            logits start the answer. Other calls of a model that generates use 0, as the paper does; those of an encoder
            or a classifier, whose last token is pooled, use this number.
        min_prompt: prompts of fewer tokens are computed in every layer that is not removed, as generated tokens are:
            selecting costs more there than it leaves out. What counts is the whole prompt, cached tokens included, as
            far as it is known: in `generate()`, in `orthorank.context` and in vLLM it is; else a call is judged by its
            tokens and those before them. 0: no prompt is too short.
        decode: ``"dense"``: generated tokens pass every layer (except removed ones); ``"threshold"``: they are selected
            by the layer's threshold like all others (with ``select="threshold"``).
        select: ``"topk"``: exactly the ``floor(keep_ratio * tokens)`` best tokens of a sequence (or prefill chunk);
            ``"window"``: the best of each window of ``select_window`` tokens; ``"threshold"``: every token that scores
            below the layer's threshold.
        select_window: tokens of a window of ``select="window"``, counted from the row's first token.
        thresholds: of each selecting layer for ``select="threshold"``; `orthorank calibrate` finds them.
        kv: ``"all"``: a selected layer computes keys and values of all tokens; ``"selected"``: of the selected ones
            only, the paper's ablation (Table 3).
        update_sink: whether the sink is always updated, counted inside ``keep_ratio``; the paper never updates it.
        sinks: ``"first"``: the first token is the sink; ``"auto"``: other tokens that look like it rank last, too.
        model_id, model_revision, model_type, num_hidden_layers, hidden_size: the model the plan was made for; `apply`
            refuses another one. None means "not stated" and is not checked.
        sink_layer: the layer after which the sink token's state was found to form.
        calibration: what the layers were chosen on (text hash, tokens, windows, loss, method).
        measured: figures measured with this plan.
        version: version of this package that wrote the plan.
        correction: maps that put back part of what the layers leave out, by layer; `orthorank.fit_correction` finds
            them. None: left-out tokens stay as they are, as in the paper.

    Attributes:
        source: ``org/name@commit`` of a plan that was read from the Hugging Face Hub, else None. It is not saved, not
            compared, and no argument.

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
    keep_ratios: dict[int, float] = field(default_factory=dict)
    keep_multiple: int = 1
    criterion: str = "orthogonal"
    seed: int = 0
    keep_last: int = 1
    min_prompt: int = 0
    decode: str = "dense"
    select: str = "topk"
    select_window: int | None = None
    thresholds: dict[int, float] = field(default_factory=dict)
    kv: str = "all"
    update_sink: bool = False
    sinks: str = "first"
    model_id: str | None = None
    model_revision: str | None = None
    model_type: str | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    sink_layer: int | None = None
    calibration: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    version: str = __version__
    correction: "Correction | None" = None
    source: str | None = field(default=None, init=False, compare=False, repr=False)  # not copied by `replace`

    def __post_init__(self) -> None:
        check_fields(self)

    def ratio(self, layer: int) -> float:
        """Share of the tokens that ``layer`` updates: 1 for a layer that the plan does not name.

        Example:
            >>> plan = OrthoRankConfig(layers=[12, 14, 15], keep_ratio=0.5, keep_ratios={14: 0})
            >>> [plan.ratio(layer) for layer in (12, 13, 14)]
            [0.5, 1.0, 0.0]
        """
        return self.keep_ratios.get(layer, self.keep_ratio) if layer in self.layers else 1.0

    @property
    def ratios(self) -> dict[int, float]:
        """`ratio` of each of ``layers``."""
        return {layer: self.ratio(layer) for layer in self.layers}

    @property
    def selecting(self) -> list[int]:
        """The layers that select tokens: those of ``layers`` that are neither removed nor dense."""
        return [layer for layer in self.layers if 0 < self.ratio(layer) < 1]

    @property
    def ranks(self) -> dict[int, int]:
        """The rank of the map of each corrected layer; empty without a correction."""
        return {} if self.correction is None else dict.fromkeys(self.correction.layers, self.correction.rank)

    def nominal_sparsity(self, num_hidden_layers: int | None = None) -> float:
        """Share of token-layer updates that are left out: the sum of ``1 - ratio(layer)`` / ``num_hidden_layers``."""
        total = num_hidden_layers or self.num_hidden_layers
        if not total:
            raise OrthoRankError("num_hidden_layers is not stated in the plan; pass it as an argument")
        if not self.keep_ratios:
            return len(self.layers) * (1 - self.keep_ratio) / total
        return sum(1 - self.ratio(layer) for layer in self.layers) / total

    @classmethod
    def for_model(cls, model: "PreTrainedModel", **fields: Any) -> "OrthoRankConfig":
        """A plan with the model's fields filled in from ``model``; ``fields`` as for the class."""
        config = model.config.get_text_config()
        known = {name: getattr(config, name) for name in ("model_type", "num_hidden_layers", "hidden_size")}
        known |= {"model_id": hub_id(model), "model_revision": getattr(model.config, "_commit_hash", None)}
        return cls(**known | fields)

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON stores them: mappings by layer have strings as keys, records no infinite figures.

        Of a correction it says what `save_pretrained` writes beside it; without one there is no such key.
        """
        values = dataclasses.asdict(self)
        del values["source"]
        if (correction := values.pop("correction")) is not None:
            values["correction"] = correction.to_dict()
        values |= {name: finite(values[name]) for name in RECORDS}
        return values | {name: {str(layer): x for layer, x in values[name].items()} for name in BY_LAYER}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "OrthoRankConfig":
        """The plan in ``values``.

        Keys that this version does not know are ignored with a warning. It also warns of a plan that a newer version
        wrote, and of one without layers, with which a model is the dense one.
        """
        if not isinstance(values, dict):
            raise OrthoRankError(f"a plan is a JSON object, not {type(values).__name__}")
        if wrong := [key for key in values if not isinstance(key, str)]:
            raise OrthoRankError(f"the plan has the key {shown(wrong[0])}; its keys must be names of fields, strings")
        known = {f.name for f in dataclasses.fields(cls) if f.init}
        if unknown := sorted(set(values) - known):
            version = values.get("version")
            newer = isinstance(version, str) and release_of(version) > release_of(__version__)
            remedy = "a newer version may follow them" if newer else "check the spelling"
            warnings.warn(
                f"this plan (written by version {values.get('version', 'unknown')}) has keys that version "
                f"{__version__} does not know and ignores: {', '.join(unknown)}; {remedy}",
                UnknownKeysWarning,
                stacklevel=levels_to_caller(),
            )
        if "layers" not in values:
            raise OrthoRankError("the plan has no key 'layers'; it must list the layers that select tokens")
        plan = cls(**{k: v for k, v in values.items() if k in known})
        if release_of(plan.version) > release_of(__version__):
            warnings.warn(
                f"this plan was written by version {plan.version}, and this is {__version__}: what its fields mean may "
                "have changed; follow it with that version",
                stacklevel=levels_to_caller(),
            )
        if not plan.layers:
            warnings.warn("this plan names no layers: with it a model is the dense one", stacklevel=levels_to_caller())
        return plan

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        maps_dtype: str | None = None,
        push_to_hub: bool = False,
        **hub: Any,
    ) -> Path:
        """Write ``folder/orthorank.json`` (sorted keys, replaced in one step) and return its path.

        The maps of a correction go to ``folder/correction.safetensors``, which the JSON names by its hash.

        Args:
            folder: made where it is not there.
            maps_dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``: what the maps are rounded to. They are applied
                in float32 all the same. None: as they are.
            push_to_hub: whether the files go to the Hugging Face Hub, too, as one commit.
            hub: of the push: ``repo_id`` (default: the folder's name), ``token``, ``private`` (of a new repository),
                ``revision`` (a branch), ``commit_message``, ``commit_description`` and ``create_pr``, as
                huggingface_hub takes them.

        Raises:
            OrthoRankError: it cannot be written, a field was changed to something illegal, the JSON is larger than
                1 MiB, or the maps lose their meaning in ``maps_dtype``; then nothing is. Or the Hub refuses; then the
                folder is written.
        """
        check_fields(self)
        plan = self
        if self.correction is not None and maps_dtype is not None:
            plan = dataclasses.replace(self, correction=self.correction.to(maps_dtype))
        text = json_of(plan.to_dict())
        if hub or push_to_hub:
            from orthorank.plan_files import check_push

            check_push(push_to_hub, hub)
        where = user_path("folder", folder)
        try:
            where.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OrthoRankError(f"the plan cannot be written to {where}: {error.strerror}") from error
        files = [where / FILE_NAME]
        if plan.correction is not None:
            from orthorank.correction import FILE_NAME as MAPS_NAME

            files.append(where / MAPS_NAME)
            plan.correction.save(files[1])
        write_text(files[0], text)
        if push_to_hub:
            from orthorank.common.hub import push

            push(files, **{"repo_id": where.resolve().name, "commit_message": "Upload a plan of OrthoRank"} | hub)
        return files[0]

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        check: "Callable[[OrthoRankConfig], None] | None" = None,
    ) -> "OrthoRankConfig":
        """Read a plan from a JSON file, a folder with ``orthorank.json``, or a repository of the Hugging Face Hub.

        The maps of a corrected plan are read from ``correction.safetensors`` beside the JSON file. Of a repository
        these two files are read and no others, both at one commit, which `source` then names. Nothing in them runs.

        Args:
            path: a file or folder, or else ``org/name`` or ``org/name@revision`` on the Hub. What is there locally is
                taken first; with ``HF_HUB_OFFLINE=1`` the Hub's local cache is.
            revision: a branch, tag or commit of a repository; None: its main branch.
            token: for a private repository, as huggingface_hub takes it; None: of the login, if there is one.
            check: called with the plan without its maps, whose hidden size it has, before they are fetched or read; it
                raises to refuse.

        Raises:
            OrthoRankError: a file cannot be read, is broken, too large, or is not the other's.
        """
        from orthorank.plan_files import find_plan, naming

        found = find_plan(path, revision, token)
        values, record = found.values, None
        with naming(found.name):
            if isinstance(values, dict) and values.get("correction") is not None:
                from orthorank.correction import FILE_NAME as MAPS_NAME
                from orthorank.correction import Correction, Record

                record = Record.of(values["correction"])
                values = {key: value for key, value in values.items() if key != "correction"}
            plan = cls.from_dict(values)
            if record is not None:
                check_maps(plan, record.layers, record.hidden_size)
            if check is not None:
                check(plan if record is None else dataclasses.replace(plan, hidden_size=record.hidden_size))
        if record is not None:
            maps = found.fetch_maps(MAPS_NAME, record.most_bytes)
            with naming(found.name):
                plan.correction = Correction.load(maps, record)
        plan.source = found.source
        return plan


def hub_id(model: "PreTrainedModel") -> str | None:
    """The hub id that ``model`` was loaded from, or None when it came from a folder or was made from a config."""
    name = getattr(model.config, "_name_or_path", "") or ""
    looks_like_hub_id = name.count("/") <= 1 and not name.startswith((".", "~", os.sep)) and not os.path.exists(name)
    return name if name and looks_like_hub_id else None


def layer_count(num_layers: int, sparsity: float, keep_ratio: float = 0.0) -> int:
    """Layers to switch for a nominal sparsity: ``floor(num_layers * sparsity / (1 - keep_ratio) + 1e-6)``.

    Args:
        num_layers: decoder layers of the model.
        sparsity: share of token-layer updates to leave out, above 0 and below 1.
        keep_ratio: share of tokens that a switched layer still updates, 0 (layer pruning) to below 1. The paper's
            "33 %" is 1/3.

    Returns:
        The number of layers (paper, section 4.1: the layer ratio), which may be 0.

    Raises:
        OrthoRankError: an argument out of range, or more layers would be needed than there are.

    Example:
        >>> layer_count(32, 0.2, 1/3), layer_count(32, 0.2)  # OrthoRank and layer pruning at 20 %
        (9, 6)
    """
    check_integer("num_layers", num_layers, 1)
    check_share("sparsity", sparsity, "such as 0.2 for 20 %")
    check_share("keep_ratio", keep_ratio, "0 for layer pruning (1 leaves nothing out)", zero=True)
    count = math.floor(num_layers * sparsity / (1 - keep_ratio) + _ROUNDING)
    if count > num_layers:
        raise OrthoRankError(
            f"a sparsity of {sparsity} with keep_ratio {keep_ratio:.4g} needs {count} layers and the model has "
            f"{num_layers}; lower the sparsity to at most {1 - keep_ratio:.4g}, or lower keep_ratio"
        )
    return count
