"""The best mixed plan under a budget: each layer dense, selecting at one of several keep ratios, or removed.

    1  every single change of the dense model is scouted, so that it is known what is worth trying
    2  down: the step with the least loss per saved unit, again and again, until the budget is met. Estimates order the
       candidates (lazy greedy); the first few of them are measured, and the best of these is taken
    3  exchanges: undo one or two steps and do one or two others, while the loss falls. What every single step does to
       the plan, which may be very different from what it does alone, is scouted first, and again when nothing more is
       found though the plan has changed since

Given plans (OrthoRank's and SLEB's, whose layers all have one form) are measured before that. 2 and 3 stop at the cost
of each of them, too, and 3 begins there from the best plan that is known at that cost. All plans that were measured are
kept, so for each given plan the front has one that costs no more and whose loss is no larger: by construction.

Which plans are tried is a matter of heuristics; every loss that is reported was measured on all calibration windows.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contrib.budget.estimates import Estimates, exchanges
from contrib.budget.pareto import Point, best_within
from contrib.budget.plans import DENSE, Plan, Space, Step, changed, key_of
from contrib.budget.state import BudgetInterrupted, BudgetState, Ledger, PlanLoss
from orthorank.common.errors import OrthoRankError

ROUNDING = 1e-9  # of the dense cost: costs are sums


@dataclass(frozen=True)
class Effort:
    """How much a search tries.

    Args:
        tries: candidates measured for one step down. exchanges: exchanges measured at each cost where it stops.
        patience: of them in a row that do not lower the loss, after which it goes on.
    """

    tries: int = 4
    exchanges: int = 48
    patience: int = 16

    def __post_init__(self) -> None:
        for name, least in (("tries", 1), ("exchanges", 0), ("patience", 1)):
            if getattr(self, name) < least:
                raise OrthoRankError(f"{name} is {getattr(self, name)}; it must be {least} or more")


@dataclass(frozen=True)
class Progress:
    """Where a search is.

    Args:
        done: questions answered so far. expected: of how many, an estimate that changes as the search goes on.
        phase: in words. loss: the last answer, inf when it is above what would have been of use.
        best: least loss at the present cost or below, inf before there is one.
        fresh: whether it took work to answer; False for what an earlier run has left.
    """

    done: int
    expected: int
    phase: str
    loss: float
    best: float
    fresh: bool = True


OnProgress = Callable[[Progress], None]


def budget_search(
    losses: PlanLoss,
    space: Space,
    budget: float,
    *,
    starts: Mapping[str, Plan] | None = None,
    effort: Effort | None = None,
    state: BudgetState | None = None,
    on_progress: OnProgress | None = None,
    save_to: Path | None = None,
) -> BudgetState:
    """Search for the mixed plan of least loss whose layers cost at most ``budget`` of what they cost dense.

    Args:
        losses: the calibration loss. space: what each layer may be, and what it costs.
        budget: above 0, to 1.
        starts: given plans by name; their costs are met, too. effort: how much is tried.
        state: of an earlier search with the same arguments, to be continued.
        on_progress: called after each answer. save_to: a file that gets the state as JSON before that.

    Returns:
        The state; `best_plan` reads the result from it, ``state.points(space)`` all plans that were measured.

    Raises:
        OrthoRankError: an argument out of range, a budget that no plan meets, infinite losses, or another search's
            state.
        BudgetInterrupted: Ctrl-C; its ``state`` holds what was found.

    Example:
        >>> from contrib.budget.costs import CostTable
        >>> class Sum:  # a layer's loss grows with what it leaves out, the more so the later it comes
        ...     fingerprint = "an example"
        ...     def loss(self, plan, limit=math.inf):
        ...         total = 1 + sum((layer + 1) * (1 - ratio) ** 2 for layer, ratio in plan.items())
        ...         return total if total <= limit else math.inf
        ...     scout = loss
        ...     def follow(self, plan): pass
        >>> costs = CostTable("flops", 8, {1.0: (2.0,) * 4, 0.5: (1.0,) * 4, 0.0: (0.0,) * 4})
        >>> space = Space.of(costs, [0.5, 0.0], select=range(4), skip=range(4))
        >>> state = budget_search(Sum(), space, 0.75)
        >>> best_plan(state, space, 0.75).plan
        {0: 0.5, 1: 0.5}
    """
    effort = effort or Effort()
    _check_budget(space, budget)
    given = {name: dict(key_of(plan)) for name, plan in (starts or {}).items()}
    settings = settings_of(losses, space, budget, given, effort)
    if state is None:
        state = BudgetState(settings)
    state.check(settings)
    state.origins = {key_of({}): "dense"} | {key_of(plan): name for name, plan in given.items()}
    search = _Search(Ledger(losses, state), space, effort, on_progress, save_to)
    try:
        search.run(budget * space.costs.dense, given)
    except KeyboardInterrupt as stop:
        raise BudgetInterrupted(state) from stop
    return state


def best_plan(state: BudgetState, space: Space, budget: float) -> Point | None:
    """The plan of least loss that costs at most ``budget`` of the dense layers; None: none was measured so far."""
    return best_within(state.points(space), _most(space, budget * space.costs.dense))


def settings_of(
    losses: PlanLoss, space: Space, budget: float, starts: Mapping[str, Plan], effort: Effort
) -> dict[str, Any]:
    """What the course of a search depends on, as JSON stores it."""
    return {
        "losses": losses.fingerprint,
        "costs": space.costs.to_dict(),
        "keep_ratios": [[layer, list(ratios)] for layer, ratios in space.ratios.items()],
        "budget": budget,
        "starts": [[name, [list(pair) for pair in key_of(plan)]] for name, plan in starts.items()],
        "effort": asdict(effort),
    }


def _check_budget(space: Space, budget: float) -> None:
    if not 0 < budget <= 1:
        raise OrthoRankError(
            f"budget is {budget}; it must be above 0 and at most 1, such as 0.8 for 80 % of what the dense layers cost"
        )
    if space.cheapest > _most(space, budget * space.costs.dense):
        least = math.ceil(1000 * space.cheapest / space.costs.dense) / 1000
        raise OrthoRankError(
            f"budget is {budget:g}, and the cheapest plan costs {least:g} of the dense layers; raise the budget, or "
            "allow more layers to change or smaller keep ratios (0 removes a layer)"
        )


def _most(space: Space, cost: float) -> float:
    return cost + ROUNDING * space.costs.dense


class _Search:
    """One run of the three phases."""

    def __init__(
        self, ledger: Ledger, space: Space, effort: Effort, on_progress: OnProgress | None, save_to: Path | None
    ) -> None:
        self.ledger, self.space, self.effort = ledger, space, effort
        self.on_progress, self.save_to = on_progress, save_to
        self.estimates = Estimates()
        self.phase, self.target, self.to_come = "", space.costs.dense, 0

    def run(self, budget: float, given: Mapping[str, Plan]) -> None:
        """All of it: ``budget`` in the unit of the costs."""
        targets = sorted({budget, *(self.space.cost(plan) for plan in given.values())}, reverse=True)
        singles = [step for step in self.space.steps({}) if step.saved > 0]
        self.phase, self.target = "given plans", targets[0]
        self.to_come = 2 + len(given) + len(singles) + self._expected({}, targets)
        if not math.isfinite(self.loss({})):
            raise OrthoRankError("the loss of the dense model is infinite or NaN; check the model and the text")
        for start in given.values():
            self.loss(start)
        self._scout("each layer alone", {}, singles)
        plan: dict[int, float] = {}
        for number, target in enumerate(targets):
            self.target, self.to_come = target, self._expected(plan, targets[number:])
            self._down(plan, target)
            if (found := self.ledger.best(self.space, _most(self.space, target))) is None:
                raise OrthoRankError("the loss of every plan that was tried is infinite or NaN; check the model")
            later = self._expected(found[1], targets[number + 1 :])
            self.to_come = len(singles) + self.effort.exchanges + later
            plan = self._exchange(*found, target)

    def loss(self, plan: Plan, limit: float = math.inf) -> float:
        """Ask, save, tell."""
        loss = self.ledger.loss(plan, limit)
        self._tell(loss)
        return loss

    def scout(self, plan: Plan) -> float:
        """The same for the cheap estimate."""
        loss = self.ledger.scout(plan)
        self._tell(loss)
        return loss

    def _tell(self, loss: float) -> None:
        self.to_come = max(0, self.to_come - 1)
        if self.save_to is not None and self.ledger.fresh:
            self.ledger.state.save(self.save_to)
        if self.on_progress is not None:
            found = self.ledger.best(self.space, _most(self.space, self.target))
            best = math.inf if found is None else found[0]
            done, fresh = self.ledger.asked, self.ledger.fresh
            words = f"{self.phase}, at {self.target / self.space.costs.dense:.3f} of the dense cost"
            self.on_progress(Progress(done, done + self.to_come, words, loss, best, fresh))

    def _scout(self, phase: str, plan: dict[int, float], steps: Sequence[Step]) -> None:
        """Estimate what each of ``steps`` from ``plan`` does."""
        self.phase = phase
        self.ledger.losses.follow(plan)
        before = self.scout(plan)
        for step in steps:
            change = self.scout(changed(plan, step)) - before
            if not math.isnan(change):  # infinite ones are learnt: they come last
                self.estimates.learn(plan, [step], change)

    def _down(self, plan: dict[int, float], target: float) -> None:
        """Steps from ``plan`` until it costs ``target``, or no step saves anything any more."""
        self.phase = "down"
        loss = self.loss(plan)
        while (need := self.space.cost(plan) - target) > ROUNDING * self.space.costs.dense:
            self.ledger.losses.follow(plan)
            if (found := self._best_step(plan, loss, need)) is None:
                return
            loss, plan = found[0], changed(plan, found[1])

    def _best_step(self, plan: dict[int, float], loss: float, need: float) -> tuple[float, Step] | None:
        """The step down with the least loss for what it saves of ``need``, among the most promising; its loss first."""

        def rank(step: Step, change: float) -> tuple[int, float]:
            return (0, change) if change <= 0 else (1, change / min(step.saved, need))

        def limit(step: Step, most: tuple[int, float]) -> float:
            return loss + (most[1] if most[0] == 0 else most[1] * min(step.saved, need))

        steps = [step for step in self.space.steps(plan) if step.saved > 0]
        hopes = {step: rank(step, self.estimates.change(plan, [step])) for step in steps}
        best, best_rank = None, (2, math.inf)
        for tries, step in enumerate(sorted(steps, key=hopes.__getitem__)):
            if best is not None and (tries >= self.effort.tries or hopes[step] >= best_rank):
                break
            most = math.inf if best is None else limit(step, best_rank)
            found = self.loss(changed(plan, step), most)
            self._learn(plan, [step], found, loss, most)
            if math.isfinite(found) and rank(step, found - loss) < best_rank:
                best, best_rank = (found, step), rank(step, found - loss)
        return best

    def _learn(self, plan: dict[int, float], steps: Sequence[Step], found: float, loss: float, limit: float) -> None:
        """From the loss ``found`` after ``steps``, ``loss`` before them; from inf, that it is above ``limit``."""
        expected = self.estimates.change(plan, steps)
        change = found - loss if math.isfinite(found) else max(expected, limit - loss)
        self.estimates.learn(plan, steps, change)

    def _exchange(self, loss: float, plan: dict[int, float], target: float) -> dict[int, float]:
        """``plan`` after exchanges that lower its loss and keep its cost within ``target``."""
        failures, scouted, left = 0, None, self.effort.exchanges
        while left > 0:
            if scouted is None or (failures >= self.effort.patience and scouted != plan):
                self._scout_from(plan, left)
                scouted, failures = plan, 0
            steps = self._most_promising(plan, loss, target)
            if steps is None or failures >= self.effort.patience:
                break
            self.phase, left = "exchanges", left - 1
            found = self.loss(changed(plan, *steps), loss)
            self._learn(plan, steps, found, loss, loss)
            failures += 1
            if found < loss:
                plan, loss, failures = changed(plan, *steps), found, 0
                self.ledger.losses.follow(plan)
        return plan

    def _scout_from(self, plan: dict[int, float], left: int) -> None:
        """Estimate what each single step does where ``plan`` stands: undoing first, since others build on it."""
        steps = sorted(self.space.steps(plan), key=lambda step: step.ratio != DENSE)
        self.to_come = max(self.to_come, len(steps) + 1 + left)
        self._scout("every step from here", plan, steps)

    def _most_promising(self, plan: dict[int, float], loss: float, target: float) -> tuple[Step, ...] | None:
        room = _most(self.space, target) - self.space.cost(plan)
        best, best_change = None, math.inf
        for steps in exchanges(self.space, plan, self.estimates):
            if -sum(step.saved for step in steps) > room:
                continue
            change = self.estimates.change(plan, steps)
            if change < best_change and not self.ledger.hopeless(changed(plan, *steps), loss):
                best, best_change = steps, change
        return best

    def _expected(self, plan: Plan, targets: Sequence[float]) -> int:
        """Questions on the way from ``plan`` to the last of ``targets``, if a step saves half of a dense layer."""
        if not targets:
            return 0
        step = self.space.costs.dense / self.space.costs.num_layers / 2
        steps = math.ceil(max(0.0, self.space.cost(plan) - targets[-1]) / step)
        scouted = sum(map(len, self.space.ratios.values()))
        return steps * self.effort.tries + len(targets) * (self.effort.exchanges + scouted)
