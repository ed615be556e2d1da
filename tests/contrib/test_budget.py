"""The budget search on losses that are quick: its guarantee, how close it comes to the best, going on after a stop."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from contrib.budget.budget import Effort, Progress, best_plan, budget_search
from contrib.budget.costs import CostTable
from contrib.budget.pareto import Point, best_within, front_of
from contrib.budget.plans import Space, Step, changed, key_of, plan_of
from contrib.budget.state import BudgetInterrupted, BudgetState
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from tests.contrib.plan_losses import LAYERS, Losses, all_plans, best_by_trying_all, kinds, space

LITTLE = Effort(tries=2, exchanges=6, patience=3)
FORMS = {"OrthoRank": {1: 0.25, 2: 0.25, 3: 0.25}, "SLEB": {1: 0.0, 4: 0.0}, "odd": {3: 0.5}}


@pytest.mark.parametrize("effort", [LITTLE, Effort(1, 0, 1), Effort()], ids=["little", "least", "default"])
@pytest.mark.parametrize("seed", range(4))
def test_no_worse_than_any_given_plan_at_its_own_cost(seed: int, effort: Effort) -> None:
    where = space(seed)
    for kind, losses in kinds(seed):
        state = budget_search(losses, where, 0.7, starts=FORMS, effort=effort)
        front = front_of(state.points(where))
        for name, plan in FORMS.items():
            cost, loss = where.cost(plan), losses.function(plan)
            if math.isfinite(loss):
                assert any(p.cost <= cost and p.loss <= loss for p in front), (kind, name)
                assert best_plan(state, where, cost / where.costs.dense).loss <= loss, (kind, name)


def test_the_front_holds_measured_losses_and_nothing_beats_it() -> None:
    where = space()
    for kind, losses in kinds(7):
        state = budget_search(losses, where, 0.6, starts=FORMS, effort=LITTLE)
        points = state.points(where)
        for point in points:
            assert point.loss == losses.function(point.plan), kind
            assert point.cost == where.cost(point.plan), kind
        front = front_of(points)
        assert [p.cost for p in front] == sorted(p.cost for p in front)
        assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front)), kind
        for point in points:
            assert any(p.cost <= point.cost and p.loss <= point.loss for p in front), kind
        assert best_plan(state, where, 0.6).cost <= 0.6 * where.costs.dense * (1 + 1e-8)


def test_close_to_the_best_of_all_plans() -> None:
    """The heuristic against trying all 768 plans; without structure it can do little better than chance."""
    found: dict[str, list[float]] = {}
    for seed in range(12):
        for kind, losses in kinds(seed):
            where = space(seed, uneven=seed % 2 == 0)
            plan = best_plan(budget_search(losses, where, 0.7), where, 0.7)
            best = best_by_trying_all(losses, where, 0.7 * where.costs.dense * (1 + 1e-9))
            assert plan.loss >= best, "no plan is better than the best one"
            found.setdefault(kind, []).append((plan.loss - best) / max(1e-9, abs(best - losses.function({}))))
            assert len(losses.asked) < 80, "and with few questions"
    optimal = {kind: sum(gap < 1e-9 for gap in gaps) for kind, gaps in found.items()}
    assert optimal["flat"] == 12
    for kind, least in {"a sum": 11, "worse together": 11, "partly infinite": 11, "coupled": 10}.items():
        assert optimal[kind] >= least, (kind, optimal)
        assert sum(found[kind]) / 12 < (0.02 if kind != "coupled" else 0.1), kind


def test_undoing_pays() -> None:
    """Greedy walks into a trap: layer 0 alone is cheap to remove, and spoils everything else."""

    def loss(plan: dict[int, float]) -> float:
        left = {layer: 1 - plan.get(layer, 1.0) for layer in range(LAYERS)}
        others = sum(0.2 * left[layer] for layer in range(1, LAYERS))
        return 1 + 0.05 * left[0] + others * (1 + 20 * left[0])

    where = space(uneven=False)
    trap = Losses("trap", loss)
    greedy = best_plan(budget_search(trap, where, 0.5, effort=Effort(exchanges=0)), where, 0.5)
    exchanged = best_plan(budget_search(trap, where, 0.5), where, 0.5)
    best = best_by_trying_all(trap, where, 2.5 + 1e-9)
    assert greedy.loss > 1.5 * exchanged.loss
    assert exchanged.loss == best


def test_a_layer_that_hurts_is_removed_though_the_budget_is_met() -> None:
    losses = Losses("hurts", lambda plan: 2 - 0.5 * (1 - plan.get(3, 1.0)) + 0.1 * len(set(plan) - {3}))
    where = space()
    assert best_plan(budget_search(losses, where, 1.0), where, 1.0).plan == {3: 0.0}


def stop_after(count: int) -> Any:
    """Ctrl-C after so many answers."""

    def tell(progress: Progress) -> None:
        if progress.done == count:
            raise KeyboardInterrupt

    return tell


def test_interrupted_anywhere_and_continued(tmp_path: Path) -> None:
    """The same result to the last bit, and nothing that was answered before is asked again."""
    where, file = space(3), tmp_path / "state.json"
    for kind, losses in kinds(3):
        told: list[Progress] = []
        whole = budget_search(losses, where, 0.6, starts=FORMS, effort=LITTLE, on_progress=told.append)
        total = len(losses.asked)
        for count in range(1, told[-1].done + 1, told[-1].done // 7):
            losses.asked.clear()
            with pytest.raises(BudgetInterrupted) as stopped:
                budget_search(
                    losses, where, 0.6, starts=FORMS, effort=LITTLE, on_progress=stop_after(count), save_to=file
                )
            loaded = BudgetState.load(file)
            assert loaded == stopped.value.state, kind
            assert isinstance(stopped.value, KeyboardInterrupt)
            state = budget_search(losses, where, 0.6, starts=FORMS, effort=LITTLE, state=loaded, save_to=file)
            assert state == whole, (kind, count)
            assert list(state.seen) == list(whole.seen), "in the same order"
            assert len(losses.asked) == total, kind
            assert BudgetState.load(file) == whole
            assert best_plan(state, where, 0.6) == best_plan(whole, where, 0.6)


@pytest.mark.parametrize("seed", range(3))
def test_losses_above_a_limit_may_be_told_and_can_only_help(seed: int) -> None:
    """One that is computed to its end is told; the state knows more then, and the search takes the same way."""
    where = space(seed)
    for (kind, brief), (_, full) in zip(kinds(seed), kinds(seed), strict=True):
        full.tells_more = True
        short, long = (budget_search(losses, where, 0.6, starts=FORMS) for losses in (brief, full))
        assert list(long.seen) == list(short.seen), kind
        assert len(full.asked) <= len(brief.asked)
        assert best_plan(long, where, 0.6).loss <= best_plan(short, where, 0.6).loss, kind


def test_interrupted_keeps_the_given_plans() -> None:
    where = space()
    losses = dict(kinds(0))["a sum"]
    with pytest.raises(BudgetInterrupted, match="after 4 evaluations") as stopped:
        budget_search(losses, where, 0.6, starts=FORMS, on_progress=stop_after(4))
    state = stopped.value.state
    assert {point.origin for point in state.points(where)} == {"dense", *FORMS}
    assert best_plan(state, where, where.cost(FORMS["SLEB"]) / where.costs.dense).origin == "SLEB"
    assert best_plan(state, where, 0.2) is None


def test_limits_are_exact(tmp_path: Path) -> None:
    """A plan that is given up is above the limit; another has its own loss; questions repeat only to know more."""
    where = space(2)
    for kind, losses in kinds(2):
        budget_search(losses, where, 0.5, starts=FORMS)
        limits: dict[Any, float] = {}
        for key, limit, answer in losses.answered:
            value = losses.function(dict(key))
            assert answer == (value if value <= limit else math.inf), kind
            assert limits.get(key, -math.inf) < limit, f"{kind}: {key} was known"
            limits[key] = math.inf if math.isfinite(answer) else limit


def test_progress() -> None:
    where, losses = space(), dict(kinds(1))["worse together"]
    told: list[Progress] = []
    state = budget_search(losses, where, 0.7, starts=FORMS, on_progress=told.append)
    assert [p.done for p in told] == list(range(1, len(told) + 1))
    assert all(p.expected >= p.done for p in told)
    phases = [p.phase.split(", at ")[0] for p in told]
    assert list(dict.fromkeys(phases)) == [
        "given plans",
        "each layer alone",
        "down",
        "every step from here",
        "exchanges",
    ]
    least = min(where.cost(plan) for plan in FORMS.values())
    assert told[-1].phase.endswith(f"at {least / where.costs.dense:.3f} of the dense cost"), "the cheapest comes last"
    assert told[-1].best == best_plan(state, where, least / where.costs.dense).loss


@pytest.mark.parametrize("change", ["budget", "starts", "effort", "losses", "costs", "keep_ratios"])
def test_a_state_of_another_search_is_refused(change: str) -> None:
    where, losses = space(), dict(kinds(0))["a sum"]
    arguments: dict[str, Any] = {"starts": {"SLEB": {1: 0.0}}, "effort": LITTLE}
    state = budget_search(losses, where, 0.7, **arguments)
    budget = 0.7
    if change == "budget":
        budget = 0.71
    elif change == "starts":
        arguments["starts"] = {"SLEB": {2: 0.0}}
    elif change == "effort":
        arguments["effort"] = Effort()
    elif change == "losses":
        losses = dict(kinds(0))["coupled"]
    elif change == "costs":
        where = Space(where.ratios, space(9).costs)
    else:
        where = Space({**where.ratios, 1: (0.5,)}, where.costs)
    with pytest.raises(OrthoRankError, match=f"state is of another search: its {change} is"):
        budget_search(losses, where, budget, state=state, **arguments)


@pytest.mark.parametrize(
    "words",
    [
        "",
        "{}",
        "[]",
        "null",
        '{"schema": 1, "search": "greedy", "settings": {}, "seen": [], "origins": []}',
        '{"schema": 1, "search": "budget", "settings": [], "seen": [], "origins": []}',
        '{"schema": 1, "search": "budget", "settings": {}, "seen": [[[["a", 0.5]], 1.0, null, null]], "origins": []}',
        '{"schema": 1, "search": "budget", "settings": {}, "seen": [[[[1, 0.5]], NaN, null, null]], "origins": []}',
        '{"schema": 1, "search": "budget", "settings": {}, "seen": [[[[1, 0.5]], 1.0]], "origins": []}',
        "[" * 100_000,
    ],
)
def test_files_that_are_no_state(words: str, tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    file.write_text(words)
    with pytest.raises(OrthoRankError, match="not the state of a budget search"):
        BudgetState.load(file)


def test_a_missing_state(tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match="no search state can be read"):
        BudgetState.load(tmp_path / "nothing.json")


def test_the_state_is_plain_json(tmp_path: Path) -> None:
    losses = dict(kinds(0))["partly infinite"]
    budget_search(losses, space(), 0.6, save_to=tmp_path / "state.json")
    text = (tmp_path / "state.json").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    json.loads(text)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (0, "budget is 0; it must be above 0"),
        (1.5, "budget is 1.5"),
        (math.nan, "budget is nan"),
        (1e-9, r"budget is 1e-09, and the cheapest plan costs 0.001"),
    ],
)
def test_impossible_budgets(budget: float, words: str) -> None:
    costs = CostTable("flops", 8, {1.0: (1.0,) * 4, 0.5: (0.6,) * 4, 0.0: (0.0,) * 4})
    where = Space.of(costs, (0.0,), select=range(4), skip=range(4))
    if budget == 1e-9:
        where = Space.of(CostTable("flops", 8, {1.0: (1.0, 1e-3), 0.0: (0.0, 0.0)}), (0.0,), select=(), skip=[0])
    with pytest.raises(OrthoRankError, match=words):
        budget_search(dict(kinds(0))["a sum"], where, budget)


def test_every_loss_infinite() -> None:
    with pytest.raises(OrthoRankError, match="dense model is infinite"):
        budget_search(Losses("nan", lambda plan: math.nan), space(), 0.8)
    with pytest.raises(OrthoRankError, match="every plan that was tried"):
        budget_search(Losses("nan", lambda plan: math.nan if plan else 2.0), space(), 0.8)


@pytest.mark.parametrize(("field", "value"), [("tries", 0), ("exchanges", -1), ("patience", 0)])
def test_effort_says_what_is_wrong(field: str, value: int) -> None:
    with pytest.raises(OrthoRankError, match=f"{field} is {value}"):
        Effort(**{field: value})


def test_what_a_layer_may_be() -> None:
    costs = CostTable("flops", 8, {r: (r, r, r) for r in (1.0, 0.5, 0.25, 0.0)})
    where = Space.of(costs, (0, 0.25, 0.5), select=[1], skip=[1, 2])
    assert where.ratios == {1: (0.5, 0.25, 0.0), 2: (0.0,)}
    assert Space.of(costs, (0.5,), select=[1], skip=[1, 2]).ratios == {1: (0.5,)}
    assert where.cheapest == 1.0
    assert list(where.steps({1: 0.25})) == [
        Step(1, 1.0, -0.75), Step(1, 0.5, -0.25), Step(1, 0.0, 0.25), Step(2, 0.0, 1.0)
    ]  # fmt: skip
    assert list(where.steps({0: 0.5}))[-1] == Step(0, 1.0, -0.5), "a given plan's layer can be dense again"
    assert changed({0: 0.5, 1: 0.25}, Step(0, 1.0, -0.5), Step(2, 0.0, 1.0)) == {1: 0.25, 2: 0.0}
    for ratios, select, words in (
        ((1.0,), [1], "keep_ratios holds 1"),
        ((-0.1,), [1], "keep_ratios holds -0.1"),
        ((math.nan,), [1], "keep_ratios holds nan"),
        ((0.5,), [3], "layer 3 may not change"),
        ((0.0,), [1], "no layer may change"),
    ):
        with pytest.raises(OrthoRankError, match=words):
            Space.of(costs, ratios, select=select, skip=[])
    with pytest.raises(OrthoRankError, match=r"layer 1 at keep ratio 0\.3 is not in the table"):
        where.cost({1: 0.3})


def test_plans_of_files() -> None:
    config = OrthoRankConfig(layers=[3, 4, 5], keep_ratio=0.5, keep_ratios={4: 0.0, 5: 1.0})
    assert plan_of(config) == {3: 0.5, 4: 0.0}
    assert key_of(plan_of(OrthoRankConfig(layers=[]))) == ()


def test_a_given_plan_with_a_ratio_of_its_own() -> None:
    """It may have layers and ratios that the search itself would not choose, and is measured all the same."""
    costs = CostTable("flops", 8, {r: (r,) * LAYERS for r in (1.0, 0.5, 0.4, 0.0)})
    where = Space.of(costs, (0.5, 0.0), select=[2, 3], skip=[3])
    losses = dict(kinds(1))["a sum"]
    given = {"mine": {0: 0.4, 1: 0.0, 2: 0.4}}
    state = budget_search(losses, where, 0.8, starts=given)
    assert best_plan(state, where, where.cost(given["mine"]) / where.costs.dense).loss <= losses.function(given["mine"])


def test_front() -> None:
    points = [Point(3, 1.0, {}), Point(1, 2.0, {}), Point(2, 2.0, {}), Point(2, 2.5, {}), Point(4, 1.5, {})]
    assert [(p.cost, p.loss) for p in front_of(points)] == [(1, 2.0), (3, 1.0)]
    assert front_of([]) == []
    assert best_within(points, 2) == Point(1, 2.0, {})
    assert best_within(points, 0.5) is None
    assert Point(1, 1000.0, {}).perplexity == math.inf


def test_brute_force_sees_every_plan() -> None:
    assert len({key_of(plan) for plan in all_plans(space())}) == 2 * 4**4
