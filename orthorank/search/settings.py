"""What a search is asked to do, checked before the long work starts, and what each method leaves alone by default."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orthorank.common.criteria import check_criterion
from orthorank.common.errors import OrthoRankError
from orthorank.common.texts import BOS

METHODS = ("greedy", "one-shot", "influence")
METRICS = ("ppl", "taylor", "magnitude")
SPARSITY, KEEP_RATIO = 0.2, 1 / 3
WINDOWS, SEQ_LEN = 4, 512  # of a text; a dataset has its own recipe

# Layers at the beginning and at the end that a method leaves alone as its paper has it: SLEB the first and the last,
# Shortened LLaMA ("+") the first four and the last two, ShortGPT none.
PROTECTED = {"greedy": (1, 1), "one-shot": (4, 2), "influence": (0, 0)}
MOST_MEMORY = 2**20  # GiB, a pebibyte
SELECTION_PROTECT_LAST = 2  # token selection in the last two layers costs many models more than anywhere else


@dataclass(frozen=True)
class SearchSettings:
    """What a search is asked to do.

    Args:
        output: folder for the plan and the state.
        model, device, device_map, dtype: as for `orthorank.models.load_model`.
        method: ``"greedy"`` (SLEB), ``"one-shot"`` (Shortened LLaMA) or ``"influence"`` (ShortGPT).
        metric: of one-shot: ``"ppl"``, ``"taylor"`` or ``"magnitude"``; None: ppl.
        keep_ratio: of a chosen layer; 0 removes it.
        criterion: by which a chosen layer selects tokens.
        sparsity, layers: how many layers, as a nominal sparsity or as their number; None: a sparsity of 0.2.
        text: a UTF-8 file; dataset: ``"wikitext2"`` or ``"c4"``, with ``:FOLDER`` for a local copy; neither: the
            text of `orthorank.common.texts.find_text`.
        windows, seq_len: calibration windows and their length in tokens; None: 4 of 512 from a text, and the
            dataset's own recipe.
        protect_first, protect_last: layers that are never chosen; None: the method's own (`protected`).
        sink_floor: choose only layers after the sink; None: for token selection yes, for layer pruning no.
        sink_layer: l_sink instead of the detected one.
        fast: successive halving over the windows (greedy only).
        resume: go on with the search whose state is in ``output``, if there is one.
        batch_size: windows in one forward; None: as memory allows.
        memory: GiB of hidden states that are kept, what does not fit is computed again; None: a quarter of the free
            memory.
        budget: search for a mixed plan whose layers cost at most this share of the dense layers.
        budget_unit: ``"flops"`` or ``"time"``, measured on this machine; None: flops.
        keep_ratios: what a layer of a mixed plan may have, 0 for removed; None: 0, 1/4, 1/3 and 1/2.
        starts: plan files that the search for a mixed plan begins from; ``"none"``: from the dense model alone; none
            given: those of ``keep_ratio`` and of layer pruning at the same nominal sparsity are searched.
        exchanges: exchanges of steps that are tried at each cost; None: 48.
        prompt_tokens: prompt length for which the cost of a layer counts; None: 2,048, or as many as the model takes.
        bos: where the tokenizer's BOS stands: one of `orthorank.common.texts.BOS`.

    Raises:
        OrthoRankError: a value is out of range, or two of them exclude each other.

    >>> SearchSettings(output=Path("out"), method="one-shot").protected
    (4, 2)
    >>> SearchSettings(output=Path("out"), method="beam")
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: method is 'beam'; it may be greedy, one-shot or influence
    """

    output: Path
    model: str | None = None
    method: str = "greedy"
    metric: str | None = None
    keep_ratio: float = KEEP_RATIO
    criterion: str = "orthogonal"
    sparsity: float | None = None
    layers: int | None = None
    text: Path | None = None
    dataset: str | None = None
    windows: int | None = None
    seq_len: int | None = None
    protect_first: int | None = None
    protect_last: int | None = None
    sink_floor: bool | None = None
    sink_layer: int | None = None
    fast: bool = False
    resume: bool = False
    device: str = "auto"
    device_map: str | None = None
    dtype: str | None = None
    batch_size: int | None = None
    memory: float | None = None
    budget: float | None = None
    budget_unit: str | None = None
    keep_ratios: tuple[float, ...] | None = None
    starts: tuple[str, ...] = ()
    exchanges: int | None = None
    prompt_tokens: int | None = None
    bos: str = "auto"

    def __post_init__(self) -> None:
        _check_choice("method", self.method, METHODS)
        check_criterion(self.criterion)
        _check_choice("bos", self.bos, BOS)
        if self.metric is not None:
            _check_choice("metric", self.metric, METRICS)
            if self.method != "one-shot":
                raise OrthoRankError(f"metric is for the method one-shot; the method is {self.method}, drop --metric")
        if not 0 <= self.keep_ratio < 1:
            raise OrthoRankError(
                f"keep_ratio is {self.keep_ratio:g}; it must be from 0 (layers are removed) to below 1, such as 1/3"
            )
        for name, least in (("windows", 1), ("seq_len", 2), ("protect_first", 0), ("protect_last", 0)):
            _check_least(name, getattr(self, name), least)
        for name, least in (("sink_layer", 0), ("layers", 1), ("batch_size", 1)):
            _check_least(name, getattr(self, name), least)
        if self.memory is not None and not 0 <= self.memory <= MOST_MEMORY:
            raise OrthoRankError(
                f"memory is {self.memory:g}; it must be 0 (keep nothing) or more, in GiB, such as 0.5, and at most "
                f"{MOST_MEMORY:,}"
            )
        self._check_pairs()
        self._check_budget()

    def _check_pairs(self) -> None:
        """Options that exclude each other."""
        if self.sparsity is not None and self.layers is not None:
            raise OrthoRankError("both sparsity and layers say how many layers to choose; give one of them")
        if self.sparsity is not None and not 0 < self.sparsity < 1:
            raise OrthoRankError(f"sparsity is {self.sparsity:g}; it must be above 0 and below 1, such as 0.2")
        if self.text is not None and self.dataset is not None:
            raise OrthoRankError("both text and dataset say what to calibrate on; give one of them")
        if self.sink_floor is False and self.sink_layer is not None:
            raise OrthoRankError("sink_layer sets the floor that no_sink_floor takes away; give one of them")
        if self.fast and self.method != "greedy":
            raise OrthoRankError(f"fast is for the method greedy; the method {self.method} is quick as it is")
        if self.device_map is not None and self.device != "auto":
            raise OrthoRankError("both device and device_map say where the model goes; give one of them")

    def _check_budget(self) -> None:
        """Options of mixed plans, and what does not go with them."""
        of_mixed = ("budget_unit", "keep_ratios", "starts", "exchanges", "prompt_tokens")
        if self.budget is None:
            if given := [name for name in of_mixed if getattr(self, name) not in (None, ())]:
                raise OrthoRankError(f"{given[0]} is for mixed plans; give a budget, such as --budget 0.8, or drop it")
            return
        if not 0 < self.budget <= 1:
            raise OrthoRankError(
                f"budget is {self.budget:g}; it must be above 0 and at most 1, such as 0.8 for 80 % of the dense layers"
            )
        if wrong := [name for name in ("sparsity", "layers", "metric") if getattr(self, name) is not None]:
            raise OrthoRankError(f"{wrong[0]} is for plans of one form, and budget is for mixed ones; give one of them")
        if self.method != "greedy":
            raise OrthoRankError(f"method is {self.method}; a search with a budget is greedy, drop --method")
        if self.keep_ratio == 0:
            raise OrthoRankError(
                "keep_ratio is 0, and with a budget it is that of the OrthoRank plan to begin from; to remove layers "
                "only, give --keep-ratios 0"
            )
        _check_choice("budget_unit", self.budget_unit or "flops", ("flops", "time"))
        if self.keep_ratios == ():
            raise OrthoRankError("keep_ratios is empty; it must have a ratio, such as 1/3, or 0 for removed layers")
        for ratio in self.keep_ratios or (0.0,):
            if not 0 <= ratio < 1:
                raise OrthoRankError(f"keep_ratios holds {ratio:g}; it must be from 0 (removed) to below 1")
        if "none" in self.starts and len(self.starts) > 1:
            raise OrthoRankError("starts is none and a plan file; give one of them")
        _check_least("exchanges", self.exchanges, 0)
        _check_least("prompt_tokens", self.prompt_tokens, 2)

    @property
    def protected(self) -> tuple[int, int]:
        """Layers at the beginning and at the end that are never chosen."""
        first, last = PROTECTED[self.method]
        if self.keep_ratio > 0:
            last = max(last, SELECTION_PROTECT_LAST)
        return (
            first if self.protect_first is None else self.protect_first,
            last if self.protect_last is None else self.protect_last,
        )

    @property
    def floored(self) -> bool:
        """Whether only layers after the sink may be chosen."""
        if self.sink_floor is not None:
            return self.sink_floor
        return self.keep_ratio > 0 or self.sink_layer is not None

    @property
    def title(self) -> str:
        """The method in words, as plans record it."""
        if self.budget is not None:
            of = "measured time" if self.budget_unit == "time" else "FLOPs"
            return f"mixed plans at {self.budget:g} of the dense layers' {of}"
        if self.method == "one-shot":
            return f"one shot by {self.metric or 'ppl'} (Shortened LLaMA)"
        names = {"greedy": "greedy search (SLEB)", "influence": "block influence (ShortGPT)"}
        return names[self.method] + (", fast" if self.fast else "")

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON stores them."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def _check_choice(name: str, value: str, legal: tuple[str, ...]) -> None:
    if value not in legal:
        raise OrthoRankError(f"{name} is {value!r}; it may be {', '.join(legal[:-1])} or {legal[-1]}")


def _check_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise OrthoRankError(f"{name} is {value}; it must be {least} or more")
