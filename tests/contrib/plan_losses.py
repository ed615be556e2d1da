"""Losses of mixed plans that are quick to ask for, kind and unkind ones, and the best plan by trying all."""

import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator

from contrib.budget.costs import CostTable
from contrib.budget.plans import Key, Plan, Space, key_of

LAYERS = 5
RATIOS = (0.5, 0.25, 0.0)


class Losses:
    """A loss as a function of the plan, which counts what it is asked."""

    def __init__(self, name: str, function: Callable[[Plan], float]) -> None:
        self.fingerprint, self.function = name, function
        self.asked: list[Key] = []
        self.answered: list[tuple[Key, float, float]] = []
        self.tells_more = False  # whether it gives losses above the limit, too

    def loss(self, plan: Plan, limit: float = math.inf) -> float:
        self.asked.append(key_of(plan))
        value = self.function(plan)
        value = value if math.isfinite(value) and (value <= limit or self.tells_more) else math.inf
        self.answered.append((key_of(plan), limit, value))
        return value

    def scout(self, plan: Plan) -> float:
        return self.function(plan) + 0.01 * _hash(plan)

    def follow(self, plan: Plan) -> None:
        pass


def space(seed: int = 0, uneven: bool = True) -> Space:
    """Five layers, the costs of which differ when ``uneven``."""
    random_ = random.Random(seed)
    dense = [random_.uniform(0.8, 1.2) if uneven else 1.0 for _ in range(LAYERS)]
    paid = {1.0: 1.0, 0.5: 0.58, 0.25: 0.36, 0.0: 0.0}
    costs = CostTable("flops", 512, {r: tuple(share * each for each in dense) for r, share in paid.items()})
    return Space.of(costs, RATIOS, select=range(1, LAYERS), skip=range(LAYERS))


def kinds(seed: int) -> Iterator[tuple[str, Losses]]:
    """One loss of each kind."""
    random_ = random.Random(f"losses {seed}")
    weight = [random_.uniform(0.02, 1.0) for _ in range(LAYERS)]
    power = [random_.uniform(1.0, 2.5) for _ in range(LAYERS)]
    pairs = {pair: random_.uniform(-0.6, 0.6) for pair in itertools.combinations(range(LAYERS), 2)}
    broken = random_.randrange(LAYERS)

    def share(layer: int, ratio: float) -> float:
        return weight[layer] * (1 - ratio) ** power[layer]

    def total(plan: Plan) -> float:
        return sum(share(layer, ratio) for layer, ratio in plan.items())

    def coupled(plan: Plan) -> float:
        left_out = {layer: 1 - plan.get(layer, 1.0) for layer in range(LAYERS)}
        return sum(pairs[a, b] * left_out[a] * left_out[b] for a, b in pairs)

    yield "a sum", Losses("sum", lambda plan: 2 + total(plan))
    yield "worse together", Losses("product", lambda plan: 2 * math.exp(total(plan) ** 1.5))
    yield "coupled", Losses("coupled", lambda plan: 5 + total(plan) + coupled(plan))
    yield "better without", Losses("better", lambda plan: 5 - total(plan) + 3 * coupled(plan))
    yield "no structure", Losses("noise", lambda plan: 1 + _hash(plan, seed))
    yield "flat", Losses("flat", lambda plan: 1.0)
    yield (
        "partly infinite",
        Losses("broken", lambda plan: math.nan if plan.get(broken, 1.0) < 0.5 else 2 + total(plan)),
    )


def all_plans(space: Space) -> Iterator[dict[int, float]]:
    """Every plan of ``space``."""
    choices = [(1.0, *space.ratios[layer]) for layer in space.ratios]
    for ratios in itertools.product(*choices):
        yield dict(key_of(dict(zip(space.ratios, ratios, strict=True))))


def best_by_trying_all(losses: Losses, space: Space, most: float) -> float:
    """The least loss at a cost of ``most`` or less."""
    values = [losses.function(plan) for plan in all_plans(space) if space.cost(plan) <= most]
    return min(value for value in values if math.isfinite(value))


def _hash(plan: Plan, seed: int = 0) -> float:
    digest = hashlib.sha256(f"{seed} {key_of(plan)}".encode()).digest()
    return int.from_bytes(digest[:4], "little") / 2**32
