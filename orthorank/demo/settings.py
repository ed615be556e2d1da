"""What a run of the demo is asked to do, checked before the long work starts."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError, check_integers, check_share
from orthorank.common.texts import check_bos
from orthorank.config import SPARSITY, OrthoRankConfig
from orthorank.search.settings import KEEP_RATIO, SearchSettings

PLANS = ("auto", "search", "default")  # that are no paths
TOKENS_AT_ONCE = 1024  # in one forward of a search: more save little on a CPU, and their logits take memory


@dataclass(frozen=True)
class Settings:
    """What a run is asked to do.

    Args:
        output: folder for the results.
        model, device: as for `orthorank.models.load_model`. text: a file; None: see `orthorank.common.texts`.
        plan: ``"search"``, ``"default"`` (the one shipped for the model), ``"auto"`` (that one if there is one and
            nothing is said of the search, otherwise a search), or a plan's file or folder.
        sparsity: nominal share of token-layer updates that a search or a shipped plan leaves out; None: 0.1.
        keep_ratio: of a selected layer, in a search or with ``layers``; None: 1/3.
        windows, window: calibration windows and their length in tokens. Layers are searched on them and maps fitted.
        rank: of the maps of the corrected rows, or the hidden size where that is less; 0: no maps are fitted.
        layers: layers to select instead of a search. sink_layer: l_sink instead of the detected one.
        held_out_windows, held_out_len: windows that perplexity is measured on, and their length in tokens.
        prompt_tokens, rounds: length of the timed prompt, and timed runs of each variant.
        bos: where the tokenizer's BOS stands: one of `orthorank.common.texts.BOS`.
        prompts: a file of prompts that the dense model and the plans answer, as `orthorank.evaluation.compare` reads
            it; None: they answer none.

    Raises:
        OrthoRankError: a value is out of range, or two of them exclude each other.

    >>> Settings(output=Path("out"), sparsity=1.5)
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: sparsity is 1.5; it must be above 0 and below 1, such as 0.1
    """

    output: Path
    model: str | None = None
    text: Path | None = None
    plan: str = "auto"
    sparsity: float | None = None
    keep_ratio: float | None = None
    windows: int = 8
    window: int = 512
    rank: int = 64
    device: str = "auto"
    layers: list[int] | None = None
    sink_layer: int | None = None
    held_out_windows: int = 8
    held_out_len: int = 512
    prompt_tokens: int = 2048
    rounds: int = 3
    bos: str = "auto"
    prompts: Path | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_share("sparsity", self.sparsity, "such as 0.1")
        if self.keep_ratio is not None:
            check_share(
                "keep_ratio", self.keep_ratio, "such as 1/3 (layer pruning, which is 0, is measured in any case)"
            )
        check_integers(vars(self), windows=1, window=16, rank=0, prompt_tokens=16, rounds=1)
        if self.rank and self.windows < 2:
            raise OrthoRankError(
                "windows is 1; maps are fitted on some windows and judged on others: give 2 or more, or rank 0, which "
                "leaves the corrected rows out"
            )
        check_bos(self.bos)
        if not self.plan:
            raise OrthoRankError("plan is empty; it may be search, default, or a plan's file or folder")
        self._check_one_source()

    @property
    def searches(self) -> bool:
        """Whether something is said that is of a search alone."""
        return self.plan == "search" or self.keep_ratio is not None or self.sink_layer is not None

    def _check_one_source(self) -> None:
        """The layers come from one place: a search, a plan or a list."""
        if self.layers is not None and self.plan != "auto":
            raise OrthoRankError(f"both layers and plan ({self.plan}) say which layers to take; give one of them")
        if self.layers is not None and not self.layers:
            raise OrthoRankError("layers is empty; name at least one layer, such as 12,13")
        if self.sparsity is not None and (self.layers is not None or self.plan not in PLANS):
            raise OrthoRankError("sparsity is for a search; here the layers are given, and they decide it")
        if self.keep_ratio is not None and self.plan not in ("auto", "search"):
            raise OrthoRankError(f"keep_ratio is for a search or for layers; the plan ({self.plan}) has its own")

    def check_layers(self, num_layers: int) -> None:
        """The given layers exist in a model of ``num_layers``."""
        if self.layers is not None:
            OrthoRankConfig(layers=self.layers, num_hidden_layers=num_layers)  # its error lists what is legal
        if self.sink_layer is not None and not 0 <= self.sink_layer < num_layers:
            raise OrthoRankError(f"sink_layer is {self.sink_layer}; the model has layers 0 to {num_layers - 1}")

    def search(self, **changes: Any) -> SearchSettings:
        """The settings of a search on these windows, with ``changes``."""
        return SearchSettings(
            **{
                "output": self.output,
                "text": self.text,
                "windows": self.windows,
                "window": self.window,
                "bos": self.bos,
                "batch_size": max(1, TOKENS_AT_ONCE // self.window),
            }
            | changes
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields, as JSON stores them; defaults of a search filled in."""
        values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        if self.plan in PLANS and self.layers is None:
            values |= {"sparsity": self.sparsity or SPARSITY, "keep_ratio": self.keep_ratio or KEEP_RATIO}
        return values
