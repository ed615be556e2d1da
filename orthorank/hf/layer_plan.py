"""A plan as one of its layers sees it."""

from orthorank.config import OrthoRankConfig


class LayerPlan(OrthoRankConfig):
    """``plan`` for ``layer`` alone: what is asked of it by number is answered without looking at the number.

    A compiled graph would take the number for a constant. So layers that are compiled one by one, and have the same
    ratio, share a graph.

    Example:
        >>> of_2 = LayerPlan(OrthoRankConfig(layers=[1, 2], keep_ratio=0.5, keep_ratios={2: 0.25}), 2)
        >>> of_2.ratio(2), of_2.criterion
        (0.25, 'orthogonal')
    """

    def __init__(self, plan: OrthoRankConfig, layer: int) -> None:
        self.__dict__.update(vars(plan))
        self.own_ratio, self.own_threshold = plan.ratio(layer), plan.thresholds.get(layer)

    def ratio(self, layer: int) -> float:
        """The layer's share of tokens."""
        return self.own_ratio


def threshold_of(plan: OrthoRankConfig, layer: int) -> float:
    """Below which tokens of ``layer`` are selected, for a plan that selects by thresholds."""
    own = plan.own_threshold if isinstance(plan, LayerPlan) else None
    return plan.thresholds[layer] if own is None else own
