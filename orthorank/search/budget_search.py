"""A budget search that is set up: what it measures, and where it begins."""

from dataclasses import dataclass

from orthorank.config import OrthoRankConfig
from orthorank.search.budget import best_plan
from orthorank.search.budget_state import BudgetState
from orthorank.search.job import Job
from orthorank.search.pareto import Point
from orthorank.search.plan_loss import CalibrationLoss
from orthorank.search.plans import Space


@dataclass(frozen=True)
class Search:
    """A budget search that is set up.

    Args:
        job: what every search has. space: what each layer may be, and what it costs.
        losses: on the calibration windows. starts: plans that it begins from, by name.
        saved: what an earlier run has seen.
    """

    job: Job
    space: Space
    losses: CalibrationLoss
    starts: dict[str, OrthoRankConfig]
    saved: BudgetState | None

    @property
    def budget(self) -> float:
        """Share of the dense cost."""
        assert self.job.settings.budget is not None
        return self.job.settings.budget

    def best(self, state: BudgetState) -> Point | None:
        """The plan of least loss within the budget."""
        return best_plan(state, self.space, self.budget)
