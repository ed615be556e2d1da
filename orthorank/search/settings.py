"""What a search is asked to do, checked before the long work starts, and what each method leaves alone by default."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orthorank.common import format as words
from orthorank.common.criteria import check_criterion
from orthorank.common.errors import (
    OrthoRankError,
    check_choice,
    check_integers,
    check_max_loss,
    check_share,
    is_number,
    shown,
)
from orthorank.common.texts import check_bos
from orthorank.config import SPARSITY, layer_count

METHODS = ("greedy", "one-shot", "influence")
METRICS = ("ppl", "taylor", "magnitude")
KEEP_RATIO = 1 / 3
WINDOWS, SEQ_LEN = 4, 512  # of a text; a dataset has its own recipe
DATASET_SEQ_LEN = 2048

# Layers at the beginning and at the end that a method leaves alone as its paper has it: SLEB the first and the last,
# Shortened LLaMA ("+") the first four and the last two, ShortGPT none.
PROTECTED = {"greedy": (1, 1), "one-shot": (4, 2), "influence": (0, 0)}
SELECT_WINDOW = 64  # tokens of a selection window: a multiple of it fills vLLM's blocks
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
        select, select_window: of the plan and of every evaluation, see `OrthoRankConfig`: ``"topk"``, or ``"window"``
            with its tokens (None: 64). A plan by thresholds comes out of a found one: `orthorank.calibrate`.
        sparsity, layers: how many layers, as a nominal sparsity or as their number; None: a sparsity of 0.1, or with
            ``max_loss`` as many as it takes.
        text: a UTF-8 file; dataset: ``"wikitext2"`` or ``"c4"``, with ``:FOLDER`` for a local copy; neither: the
            text of `orthorank.common.texts.find_text`.
        windows, window: calibration windows and their length in tokens; None: 4 of 512 from a text, and the
            dataset's own recipe.
        protect_first, protect_last: layers that are never chosen; None: the method's own (`protected`).
        sink_floor: choose only layers after the sink; None: for token selection yes, for layer pruning no.
        sink_layer: l_sink instead of the detected one.
        fast: successive halving over the windows (greedy only).
        resume: go on with the search whose state is in ``output``, if there is one.
        batch_size: windows in one forward; None: as memory allows.
        memory: GiB of hidden states that are kept, what does not fit is computed again; None: a quarter of the free
            memory.
        correct: the rank of maps with which every plan is evaluated (`orthorank.fit_correction`), greedy only; None:
            plans have none.
        fit_windows: windows that these are fitted on, beside those that losses are measured on; None: twice as many.
        max_loss: of the plans on the path, take the one with the fewest FLOPs whose loss on the held-out windows rises
            by no more than this, two standard errors included, in nats a token (greedy only); None: the last one.
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
    select: str = "topk"
    select_window: int | None = None
    sparsity: float | None = None
    layers: int | None = None
    text: Path | None = None
    dataset: str | None = None
    windows: int | None = None
    window: int | None = None
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
    correct: int | None = None
    fit_windows: int | None = None
    max_loss: float | None = None
    bos: str = "auto"

    def __post_init__(self) -> None:
        check_choice("method", self.method, METHODS)
        check_criterion(self.criterion)
        check_bos(self.bos)
        if self.metric is not None:
            check_choice("metric", self.metric, METRICS)
            if self.method != "one-shot":
                raise OrthoRankError(f"metric is for the method one-shot; the method is {self.method}, drop --metric")
        check_share("keep_ratio", self.keep_ratio, "such as 1/3 (0 removes the layers)", zero=True)
        check_integers(vars(self), windows=1, window=2, protect_first=0, protect_last=0)
        check_integers(vars(self), sink_layer=0, layers=1, batch_size=1, correct=1, fit_windows=2, select_window=1)
        self._check_select()
        if self.memory is not None and not (is_number(self.memory) and 0 <= self.memory <= MOST_MEMORY):
            given = f"{self.memory:g}" if isinstance(self.memory, float) else shown(self.memory)
            raise OrthoRankError(
                f"memory is {given}; it must be 0 (keep nothing) or more, in GiB, such as 0.5, and at most "
                f"{MOST_MEMORY:,}"
            )
        check_max_loss(self.max_loss)
        self._check_pairs()

    def _check_select(self) -> None:
        if self.select == "threshold":
            raise OrthoRankError(
                "select is 'threshold', which takes numbers that belong to layers: search with topk or window, then "
                "orthorank calibrate --plan PLAN"
            )
        check_choice("select", self.select, ("topk", "window"))
        if self.select == "topk" and self.select_window is not None:
            raise OrthoRankError("select_window is for select window; add --select window, or drop --select-window")
        if self.select == "window" and self.keep_ratio == 0:
            raise OrthoRankError("select is 'window', and keep_ratio 0 removes layers, which select nothing: drop one")

    def _check_pairs(self) -> None:
        """Options that exclude each other."""
        if self.sparsity is not None and self.layers is not None:
            raise OrthoRankError("both sparsity and layers say how many layers to choose; give one of them")
        if self.sparsity is not None:
            check_share("sparsity", self.sparsity, "such as 0.2")
        if self.text is not None and self.dataset is not None:
            raise OrthoRankError("both text and dataset say what to calibrate on; give one of them")
        if self.sink_floor is False and self.sink_layer is not None:
            raise OrthoRankError("sink_layer sets the floor that no_sink_floor takes away; give one of them")
        if self.fast and self.method != "greedy":
            raise OrthoRankError(f"fast is for the method greedy; the method {self.method} is quick as it is")
        if self.correct is not None and self.method != "greedy":
            raise OrthoRankError(
                f"correct is for the method greedy; correct the plan that {self.method} finds: orthorank correct"
            )
        if self.fit_windows is not None and self.correct is None:
            raise OrthoRankError("fit_windows is for a search with maps; give their rank with --correct, or drop it")
        if self.max_loss is not None and self.method != "greedy":
            raise OrthoRankError(
                f"max_loss is for the method greedy, whose path has plans of every size, not {self.method}"
            )
        if self.device_map is not None and self.device != "auto":
            raise OrthoRankError("both device and device_map say where the model goes; give one of them")

    @property
    def selection(self) -> dict[str, Any]:
        """Fields of the plan that say how a chosen layer selects, where it is not top-k over the whole row."""
        if self.select == "topk":
            return {}
        return {"select": self.select, "select_window": self.select_window or SELECT_WINDOW}

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
    def open_ended(self) -> bool:
        """Whether ``max_loss`` says how many layers are chosen."""
        return self.max_loss is not None and self.sparsity is None and self.layers is None

    @property
    def floored(self) -> bool:
        """Whether only layers after the sink may be chosen."""
        if self.sink_floor is not None:
            return self.sink_floor
        return self.keep_ratio > 0 or self.sink_layer is not None

    def candidates(self, num_layers: int, sink_layer: int | None) -> list[int]:
        """The layers that may be chosen, ascending; ``sink_layer``: they come after it."""
        first, last = self.protected
        return list(range(max(first, 0 if sink_layer is None else sink_layer + 1), num_layers - last))

    @property
    def title(self) -> str:
        """The method in words, as plans record it."""
        if self.method == "one-shot":
            return f"one shot by {self.metric or 'ppl'} (Shortened LLaMA)"
        names = {"greedy": "greedy search (SLEB)", "influence": "block influence (ShortGPT)"}
        corrected = "" if self.correct is None else f", maps of rank {self.correct}"
        return names[self.method] + (", fast" if self.fast else "") + corrected

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON stores them."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}


def candidates_of(settings: SearchSettings, num_layers: int, sink_layer: int | None) -> list[int]:
    """`SearchSettings.candidates`.

    Raises:
        OrthoRankError: there are none, or there is no such sink layer.
    """
    if sink_layer is not None and sink_layer >= num_layers:
        raise OrthoRankError(f"sink_layer is {sink_layer}; the model has layers 0 to {num_layers - 1}")
    candidates = settings.candidates(num_layers, sink_layer)
    if not candidates:
        first, last = settings.protected
        floor = "" if sink_layer is None else f" and the sink layer is {sink_layer}"
        raise OrthoRankError(
            f"no layer may be chosen: of {num_layers} layers, {first} at the beginning and {last} at the end are "
            f"protected{floor}; lower --protect-first, --protect-last or --sink-layer"
        )
    return candidates


def count_of(settings: SearchSettings, num_layers: int, candidates: list[int]) -> int:
    """How many of ``candidates`` are chosen; where ``max_loss`` says it, at most.

    Raises:
        OrthoRankError: it is none, or more than there are.
    """
    if settings.open_ended:
        return len(candidates)
    ratio = words.ratio(settings.keep_ratio)
    sparsity = SPARSITY if settings.sparsity is None else settings.sparsity
    count = settings.layers or layer_count(num_layers, sparsity, settings.keep_ratio)
    if count < 1:
        raise OrthoRankError(
            f"sparsity is {sparsity:g}, which is less than one layer of {num_layers} with keep ratio {ratio}; the "
            f"smallest is {(1 - settings.keep_ratio) / num_layers:.3f}"
        )
    if count > len(candidates):
        asked = f"layers is {count}" if settings.layers else f"sparsity is {sparsity:g}, which needs {count} layers"
        largest = int(1000 * len(candidates) * (1 - settings.keep_ratio) / num_layers) / 1000
        raise OrthoRankError(
            f"{asked} with keep ratio {ratio}, and only {len(candidates)} may be chosen (layers "
            f"{words.layers(candidates)}); the largest sparsity here is {largest}: lower --sparsity or --layers, or "
            "protect fewer layers"
        )
    return count
