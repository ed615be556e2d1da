"""Mixed plans: what each layer may be set to, what a plan costs, and the steps from one plan to another.

A plan here is a mapping from layer to keep ratio; a layer that is not in it is dense. 0 is a removed layer.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from contrib.budget.costs import CostTable
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig

Plan = Mapping[int, float]
Key = tuple[tuple[int, float], ...]
DENSE = 1.0


def key_of(plan: Plan) -> Key:
    """``plan`` as something that can be looked up: layers ascending, dense ones left out.

    >>> key_of({14: 0.0, 12: 0.5, 20: 1.0})
    ((12, 0.5), (14, 0.0))
    """
    return tuple(sorted((layer, float(ratio)) for layer, ratio in plan.items() if ratio != DENSE))


def plan_of(config: OrthoRankConfig) -> dict[int, float]:
    """The keep ratio of each layer of a plan file, dense ones left out.

    >>> plan_of(OrthoRankConfig(layers=[12, 13], keep_ratio=0.5))
    {12: 0.5, 13: 0.5}
    """
    return {layer: config.ratio(layer) for layer in config.layers if config.ratio(layer) != DENSE}


@dataclass(frozen=True)
class Step:
    """One layer set to another keep ratio.

    Args:
        layer, ratio: which, and to what. saved: what the plan costs less by it, negative when it costs more.
    """

    layer: int
    ratio: float
    saved: float


@dataclass(frozen=True)
class Space:
    """What each layer may be set to, and what that costs.

    Args:
        ratios: for each layer that may change, its keep ratios beside 1.
        costs: of every layer at every ratio, those of given plans included.
    """

    ratios: Mapping[int, tuple[float, ...]]
    costs: CostTable

    @classmethod
    def of(cls, costs: CostTable, ratios: Iterable[float], select: Iterable[int], skip: Iterable[int]) -> "Space":
        """Layers in ``select`` may have the ratios above 0, layers in ``skip`` may be removed.

        Args:
            costs: of all layers. ratios: 0 (removed) to below 1, without 0 when nothing may be removed.
            select, skip: layer numbers.

        Raises:
            OrthoRankError: a ratio out of range or without a cost, a layer that is not there, or nothing to choose.
        """
        wanted = sorted({float(ratio) for ratio in ratios}, reverse=True)
        for ratio in wanted:
            if not 0 <= ratio < 1:
                raise OrthoRankError(
                    f"keep_ratios holds {ratio:g}; it must be from 0 (the layer is removed) to below 1 (dense layers "
                    "need no ratio)"
                )
        above, select, skip = tuple(ratio for ratio in wanted if ratio > 0), set(select), set(skip)
        for layer in sorted(select | skip):
            if not 0 <= layer < costs.num_layers:
                raise OrthoRankError(f"layer {layer} may not change: the model has layers 0 to {costs.num_layers - 1}")
        removed = (0.0,) if 0.0 in wanted else ()
        allowed = {
            layer: (above if layer in select else ()) + (removed if layer in skip else ())
            for layer in sorted(select | skip)
        }
        allowed = {layer: own for layer, own in allowed.items() if own}
        if not allowed:
            raise OrthoRankError("no layer may change: give keep ratios and layers that may have them")
        return cls(allowed, costs)

    def cost(self, plan: Plan) -> float:
        """Of ``plan``, in the unit of the table."""
        return self.costs.of(plan)

    @property
    def cheapest(self) -> float:
        """The least that a plan of this space costs."""
        best = {
            layer: min((DENSE, *own), key=lambda ratio: self.costs.layer(layer, ratio))
            for layer, own in self.ratios.items()
        }
        return self.cost(best)

    def steps(self, plan: Plan) -> Iterator[Step]:
        """All changes of one layer that change the cost: layers ascending, then ratios descending."""
        for layer, own in self.ratios.items():
            now = plan.get(layer, DENSE)
            before = self.costs.layer(layer, now)
            for ratio in (DENSE, *own):
                if saved := before - self.costs.layer(layer, ratio):
                    yield Step(layer, ratio, saved)
        for layer in sorted(set(plan) - set(self.ratios)):  # of a given plan: it can be made dense again
            if saved := self.costs.layer(layer, plan[layer]) - self.costs.layer(layer, DENSE):
                yield Step(layer, DENSE, saved)


def changed(plan: Plan, *steps: Step) -> dict[int, float]:
    """``plan`` after ``steps``, layers ascending.

    >>> changed({12: 0.5}, Step(14, 0.0, 1.0), Step(12, 1.0, -0.5))
    {14: 0.0}
    """
    after = dict(plan) | {step.layer: step.ratio for step in steps}
    return dict(key_of(after))
