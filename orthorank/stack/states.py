"""Hidden states of one batch of windows, kept by the part of a plan that they depend on, within a budget of bytes.

The state at the input of layer l depends on the ratios of the layers below l alone: its *prefix*. A question about a
plan starts from the longest prefix that is kept. States of the current plan itself, the *trunk*, serve every question
that changes one layer; states of a plan that differs from it in one layer, the *branches*, serve the next round, for as
long as it switches a layer further up. What does not fit is not kept, and so computed again.
"""

from collections import OrderedDict

from torch import Tensor

Ratios = tuple[float, ...]


class States:
    """The kept states of one batch of windows.

    Args:
        budget: bytes that may be held.

    Example:
        >>> import torch
        >>> states = States(budget=32)
        >>> states.offer((1.0,), torch.zeros(4))
        >>> states.offer((1.0, 0.5), torch.ones(4))
        >>> layer, state = states.longest((1.0, 0.5, 1.0))
        >>> layer, state.tolist(), states.bytes
        (2, [1.0, 1.0, 1.0, 1.0], 32)
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.bytes = 0
        self._kept: OrderedDict[Ratios, Tensor] = OrderedDict()  # the least recently used first
        self._plan: Ratios = ()
        self._base = -1

    def follow(self, plan: Ratios, base: int) -> None:
        """Make ``plan`` the current one; the state at the input of layer ``base`` is the last to be given up.

        States that no plan with one change to ``plan`` can use are dropped.
        """
        self._plan, self._base = plan, base
        for prefix in [prefix for prefix in self._kept if self._changes(prefix) > 1]:
            self._drop(prefix)

    def longest(self, ratios: Ratios) -> tuple[int, Tensor] | None:
        """The state kept for most layers of ``ratios``, and the layer whose input it is; None: nothing is kept."""
        longest = max(map(len, self._kept), default=0)
        for layer in range(min(longest, len(ratios)), -1, -1):
            if ratios[:layer] in self._kept:
                self._kept.move_to_end(ratios[:layer])
                return layer, self._kept[ratios[:layer]]
        return None

    def offer(self, prefix: Ratios, state: Tensor) -> None:
        """Keep ``state``, the input of layer ``len(prefix)``, if there is room or it is worth more than what is kept.

        A branch takes free room only: all branches are used once a round, so that giving up one for another would in
        the end keep none. The trunk's states take the room of branches, then that of the one used longest ago.
        """
        if prefix in self._kept:
            return
        if state.untyped_storage().nbytes() > _bytes(state):
            state = state.clone()  # a view would hold more than it shows
        if self._changes(prefix) == 0:
            self._make_room(_bytes(state))
        if self.bytes + _bytes(state) <= self.budget:
            self._kept[prefix] = state
            self.bytes += _bytes(state)

    def _make_room(self, needed: int) -> None:
        if needed > self.budget:
            return
        branches = [prefix for prefix in self._kept if self._changes(prefix)]
        trunk = [prefix for prefix in self._kept if not self._changes(prefix) and len(prefix) != self._base]
        for prefix in branches + trunk:
            if self.bytes + needed <= self.budget:
                return
            self._drop(prefix)

    def _drop(self, prefix: Ratios) -> None:
        self.bytes -= _bytes(self._kept.pop(prefix))

    def _changes(self, prefix: Ratios) -> int:
        """In how many layers ``prefix`` differs from the current plan."""
        return sum(a != b for a, b in zip(prefix, self._plan, strict=False))


def _bytes(state: Tensor) -> int:
    return state.numel() * state.element_size()
