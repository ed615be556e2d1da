"""Several processes that share the calibration windows, as the evaluator sees them."""

from typing import Protocol


class Processes(Protocol):
    """What a group of processes must offer. Every process holds the same windows, plan and state.

    Args:
        rank: this process, counted from 0; size: how many there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, values: list[float]) -> list[list[float]]:
        """The lists of all processes in the order of their ranks, on every process; lengths may differ.

        Every process calls it the same number of times, in the same order.
        """


class OneProcess:
    """A group of one: what is used without a launcher.

    Example:
        >>> OneProcess().gather([1.0, 2.0])
        [[1.0, 2.0]]
    """

    rank = 0
    size = 1

    def gather(self, values: list[float]) -> list[list[float]]:
        """A list that holds ``values`` alone."""
        return [list(values)]
