"""A budget search that is set up: what it measures, and where it begins."""

from dataclasses import dataclass

from contrib.budget.budget import best_plan
from contrib.budget.pareto import Point
from contrib.budget.plan_loss import CalibrationLoss
from contrib.budget.plans import Space
from contrib.budget.settings import BudgetSettings
from contrib.budget.state import BudgetState
from orthorank.config import OrthoRankConfig
from orthorank.search.job import Job


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
        assert isinstance(self.job.settings, BudgetSettings)
        return self.job.settings.budget

    def best(self, state: BudgetState) -> Point | None:
        """The plan of least loss within the budget."""
        return best_plan(state, self.space, self.budget)
