"""What a change of plan is expected to do to the loss, learnt from what earlier changes did.

The expectation is a sum: each layer at each keep ratio has its own share of the loss, at first the one measured with
that layer alone. Real losses are not sums, so whenever a change was measured, what it was off by is divided among the
layers that it changed. Estimates only say what to try first and what not to try; nothing is accepted by them.
"""

import itertools
from collections.abc import Iterator, Sequence

from contrib.budget.plans import DENSE, Plan, Space, Step

HOPELESS = 1e6  # nats: stands for a loss that is infinite, so that sums of estimates are never NaN
WIDTH = 16  # of the most promising steps of each kind make up exchanges of three


class Estimates:
    """Expected changes of the loss.

    Example:
        >>> estimates = Estimates()
        >>> estimates.set(12, 0.5, 0.1)
        >>> estimates.change({}, [Step(12, 0.5, 1.0)])
        0.1
        >>> estimates.learn({}, [Step(12, 0.5, 1.0)], 0.3)
        >>> estimates.change({12: 0.5}, [Step(12, 1.0, -1.0)])
        -0.3
    """

    def __init__(self) -> None:
        self._shares: dict[int, dict[float, float]] = {}

    def set(self, layer: int, ratio: float, share: float) -> None:
        """What ``layer`` at ``ratio`` adds to the loss, the dense layer being 0."""
        self._shares.setdefault(layer, {})[ratio] = share

    def change(self, plan: Plan, steps: Sequence[Step]) -> float:
        """Expected change of the loss when ``steps``, each of another layer, are taken from ``plan``."""
        return sum(
            self._share(step.layer, step.ratio) - self._share(step.layer, plan.get(step.layer, DENSE)) for step in steps
        )

    def learn(self, plan: Plan, steps: Sequence[Step], change: float) -> None:
        """Taking ``steps`` from ``plan`` changed the loss by ``change``."""
        change = max(-HOPELESS, min(HOPELESS, change))
        error = (change - self.change(plan, steps)) / len(steps)
        for step in steps:
            if step.ratio != DENSE:
                self.set(step.layer, step.ratio, self._share(step.layer, step.ratio) + error)
            else:  # the dense layer's share stays 0: what it was before had another share than was thought
                before = plan[step.layer]
                self.set(step.layer, before, self._share(step.layer, before) - error)

    def _share(self, layer: int, ratio: float) -> float:
        """Of a ratio that was never measured (a given plan may have one): that of the nearest ratio."""
        if ratio == DENSE:
            return 0.0
        known = self._shares.get(layer)
        if not known:
            return 0.0
        return known[min(known, key=lambda other: (abs(other - ratio), other))]


def exchanges(space: Space, plan: Plan, estimates: Estimates) -> Iterator[tuple[Step, ...]]:
    """Ways to change ``plan``, whatever they cost: one step; one up (to a dearer ratio) and one down; and of the most
    promising steps two up and one down, or one up and two down. The steps of one change are of different layers.
    """
    steps = list(space.steps(plan))
    changes = {step: estimates.change(plan, [step]) for step in steps}
    up = sorted((step for step in steps if step.saved < 0), key=lambda step: changes[step] / -step.saved)
    down = sorted((step for step in steps if step.saved > 0), key=lambda step: changes[step] / step.saved)
    yield from ((step,) for step in steps)
    yield from _of_different_layers(itertools.product(up, down))
    few_up, few_down = up[:WIDTH], down[:WIDTH]
    for one, others in ((few_up, few_down), (few_down, few_up)):
        pairs = itertools.combinations(others, 2)
        yield from _of_different_layers((a, b, c) for a, (b, c) in itertools.product(one, pairs))


def _of_different_layers(several: Iterator[tuple[Step, ...]]) -> Iterator[tuple[Step, ...]]:
    return (steps for steps in several if len({step.layer for step in steps}) == len(steps))
