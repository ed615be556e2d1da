"""Reduced-rank ridge regression from sums over tokens, in float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.correction import LayerMap

RIDGES = (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0)  # as shares of the mean variance of the regressors


class Moments:
    """Sums over tokens with regressors x ``[tokens, hidden]`` and what is to be explained, y, of the same shape.

    Example:
        >>> sums = Moments()
        >>> sums.add(torch.ones(3, 2), torch.ones(3, 2))
        >>> sums.count, sums.xy.tolist(), sums.yy
        (3, [[3.0, 3.0], [3.0, 3.0]], 6.0)
    """

    def __init__(self) -> None:
        self.count, self.yy = 0, 0.0
        self.x = self.y = self.xx = self.xy = torch.zeros(())

    def add(self, x: Tensor, y: Tensor) -> None:
        """Some more tokens."""
        x, y = x.double(), y.double()
        new = (x.sum(0), y.sum(0), x.T @ x, x.T @ y)
        self._add(new, len(x), float(y.square().sum()))

    def merged(self, other: "Moments") -> "Moments":
        """Of the tokens of both."""
        both = Moments()
        for one in (self, other):
            if one.count:
                both._add((one.x, one.y, one.xx, one.xy), one.count, one.yy)
        return both

    def _add(self, sums: tuple[Tensor, Tensor, Tensor, Tensor], count: int, yy: float) -> None:
        old = (self.x, self.y, self.xx, self.xy)
        self.x, self.y, self.xx, self.xy = (a.to(b.device) + b for a, b in zip(old, sums, strict=True))
        self.count, self.yy = self.count + count, self.yy + yy

    def squared_error(self, slope: Tensor, bias: Tensor) -> float:
        """The sum of ``|y - (x @ slope + bias)|²``; slope ``[hidden, hidden]``, bias ``[hidden]``."""
        of_fit = (slope * (self.xx @ slope)).sum() + self.count * bias @ bias + 2 * (self.x @ slope) @ bias
        return float(self.yy + of_fit - 2 * (slope * self.xy).sum() - 2 * bias @ self.y)


@dataclass(frozen=True)
class _Spectrum:
    """The covariance of the regressors in its own directions, so that every ridge is a division."""

    values: Tensor
    vectors: Tensor
    projected: Tensor  # of the covariance with y
    mean_x: Tensor
    mean_y: Tensor

    @classmethod
    def of(cls, sums: Moments) -> "_Spectrum":
        mean_x, mean_y = sums.x / sums.count, sums.y / sums.count
        values, vectors = torch.linalg.eigh(sums.xx - sums.count * torch.outer(mean_x, mean_x))
        projected = vectors.T @ (sums.xy - sums.count * torch.outer(mean_x, mean_y))
        return cls(values.clamp(min=0), vectors, projected, mean_x, mean_y)

    def slope(self, ridge: float) -> Tensor:
        """``[hidden, hidden]``, of all ranks."""
        strength = ridge * self.values.mean()
        return self.vectors @ (self.projected / (self.values + strength)[:, None])

    def bias(self, slope: Tensor) -> Tensor:
        """With it the mean of the outputs is that of y."""
        return self.mean_y - self.mean_x @ slope

    def reduced(self, ridge: float, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """down ``[rank, hidden]``, up ``[hidden, rank]`` and bias: the leading directions of the fitted outputs."""
        slope = self.slope(ridge)
        in_own = self.vectors.T @ slope
        up = torch.linalg.eigh(in_own.T @ (self.values[:, None] * in_own))[1][:, -rank:].flip(1)
        return (slope @ up).T, up, self.bias(slope @ up @ up.T)


def fit_map(
    fitted: Moments, held_out: Moments, rank: int, ridges: Sequence[float] = RIDGES
) -> tuple[LayerMap, float, float]:
    """The map of a layer, the share of held-out y that it explains, and its ridge.

    That of ``ridges`` with the smallest error on ``held_out`` is taken, and the share is that of a map fitted without
    these; the map that is returned is fitted on all.

    Raises:
        OrthoRankError: there are no tokens to fit, or none to hold out.

    Example:
        >>> draw = torch.Generator().manual_seed(0)
        >>> true, sums = torch.randn(6, 6, generator=draw).double(), [Moments(), Moments()]
        >>> for some in sums:
        ...     x = torch.randn(100, 6, generator=draw).double()
        ...     some.add(x, x @ true + 2)
        >>> found, explained, ridge = fit_map(*sums, rank=6)
        >>> torch.allclose((found.up @ found.down).T.double(), true, atol=1e-3), explained > 0.999, ridge
        (True, True, 0.0001)
    """
    for sums, what in ((fitted, "to fit on"), (held_out, "held out")):
        if sums.count == 0 or not sums.yy > 0:
            raise OrthoRankError(
                f"a layer leaves no token out in the windows {what} (or changes none that it leaves out): give more or "
                "longer windows, or take the layer out of the plan"
            )
    spectrum = _Spectrum.of(fitted)
    slopes = {ridge: spectrum.slope(ridge) for ridge in ridges}
    errors = {ridge: held_out.squared_error(slope, spectrum.bias(slope)) for ridge, slope in slopes.items()}
    ridge = min(errors, key=lambda each: errors[each])
    down, up, bias = spectrum.reduced(ridge, rank)
    explained = 1 - held_out.squared_error((up @ down).T, bias) / held_out.yy
    whole = _Spectrum.of(fitted.merged(held_out)).reduced(ridge, rank)
    return LayerMap(*(part.float().contiguous() for part in whole)), explained, ridge
