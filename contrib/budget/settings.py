"""What a budget search is asked to do, checked before the long work starts."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from orthorank.common.errors import OrthoRankError, check_choice, check_integers, check_share
from orthorank.search.settings import SearchSettings

UNITS = ("flops", "time")


@dataclass(frozen=True)
class BudgetSettings(SearchSettings):
    """What a budget search is asked to do, beside what every search is.

    Args:
        budget: the plan's layers cost at most this share of the dense layers.
        budget_unit: ``"flops"`` or ``"time"``, measured on this machine.
        keep_ratios: what a layer of a mixed plan may have, 0 for removed; None: 0, 1/4, 1/3 and 1/2.
        starts: plan files that the search begins from; ``"none"``: from the dense model alone; none given: those of
            ``keep_ratio`` and of layer pruning at the same nominal sparsity are searched.
        exchanges: exchanges of steps that are tried at each cost; None: 48.
        prompt_tokens: prompt length for which the cost of a layer counts; None: 2,048, or as many as the model takes.

    Raises:
        OrthoRankError: a value is out of range, or two of them exclude each other.

    >>> BudgetSettings(output=Path("out"), budget=0.8).title
    "mixed plans at 0.8 of the dense layers' FLOPs"
    """

    budget: float = dataclasses.field(kw_only=True)
    budget_unit: str = "flops"
    keep_ratios: tuple[float, ...] | None = None
    starts: tuple[str, ...] = ()
    exchanges: int | None = None
    prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.budget <= 1:
            raise OrthoRankError(
                f"budget is {self.budget:g}; it must be above 0 and at most 1, such as 0.8 for 80 % of the dense layers"
            )
        if wrong := [name for name in ("sparsity", "layers", "metric") if getattr(self, name) is not None]:
            raise OrthoRankError(f"{wrong[0]} is for plans of one form, and budget is for mixed ones; give one of them")
        if self.method != "greedy":
            raise OrthoRankError(f"method is {self.method}; a search with a budget is greedy")
        if self.keep_ratio == 0:
            raise OrthoRankError(
                "keep_ratio is 0, and with a budget it is that of the OrthoRank plan to begin from; to remove layers "
                "only, give --keep-ratios 0"
            )
        check_choice("budget_unit", self.budget_unit, UNITS)
        if self.correct is not None and self.budget_unit == "time":
            raise OrthoRankError(
                "budget_unit is time, and what maps take is counted in FLOPs only; drop --correct or it"
            )
        if self.keep_ratios == ():
            raise OrthoRankError("keep_ratios is empty; it must have a ratio, such as 1/3, or 0 for removed layers")
        for ratio in self.keep_ratios or ():
            check_share("a ratio in keep_ratios", ratio, "0 for a removed layer", zero=True)
        if "none" in self.starts and len(self.starts) > 1:
            raise OrthoRankError("starts is none and a plan file; give one of them")
        check_integers(vars(self), exchanges=0, prompt_tokens=2)

    @property
    def title(self) -> str:
        """The search in words, as plans record it."""
        of = "measured time" if self.budget_unit == "time" else "FLOPs"
        maps = "" if self.correct is None else f", maps of rank {self.correct}"
        return f"mixed plans at {self.budget:g} of the dense layers' {of}{maps}"

    def of_one_form(self, keep_ratio: float, output: Path) -> SearchSettings:
        """The settings of a search for a plan whose chosen layers all have ``keep_ratio``."""
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(SearchSettings)}
        return SearchSettings(**shared | {"keep_ratio": keep_ratio, "output": output})
