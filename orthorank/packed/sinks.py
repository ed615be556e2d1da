"""The sink's states, by the first token of a request.

The token at position 0 sees only itself, and no layer selects it. So its normalised state at every layer is a function
of its id alone: it is computed once for each first token and serves all requests that begin with it, whatever chunk,
cache hit, preemption or rank they are computed in.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from orthorank.common.errors import OrthoRankError


class SinkBank:
    """States of the last ``capacity`` first tokens; the one that was not asked for longest makes room.

    Args:
        compute: gives the states ``[layers, hidden]`` of a token id.
        capacity: how many first tokens are kept: at least the requests of one step.
        batched: whether ``compute`` is given a list of token ids, and gives ``[tokens, layers, hidden]``: all that a
            step brings for the first time at once.

    Example:
        >>> import torch
        >>> bank = SinkBank(lambda token: torch.full((2, 3), float(token)), capacity=2)
        >>> bank.slots([5, 7, 5])
        [0, 1, 0]
        >>> bank.states[:, 1, 0]  # of the second layer
        tensor([5., 7.])
        >>> bank.slots([7, 9])  # 5 makes room
        [1, 0]
    """

    def __init__(self, compute: Callable[[Any], Tensor], capacity: int, *, batched: bool = False) -> None:
        self._compute = compute
        self._batched = batched
        self._capacity = capacity
        self._slot_of: OrderedDict[int, int] = OrderedDict()
        self._states: Tensor | None = None

    @property
    def states(self) -> Tensor:
        """``[capacity, layers, hidden]``; `slots` says where each token's are."""
        if self._states is None:
            raise OrthoRankError("the bank of sinks is empty; ask for the slots of a step's first tokens before")
        return self._states

    def slots(self, tokens: Sequence[int]) -> list[int]:
        """Where the states of these first tokens are; what is not there yet is computed.

        Raises:
            OrthoRankError: more different tokens than the bank holds.
        """
        wanted = dict.fromkeys(tokens)  # in their order, which is the same on every rank
        if len(wanted) > self._capacity:
            raise OrthoRankError(
                f"a step has {len(wanted)} different first tokens and the bank of sinks holds {self._capacity}; give "
                "it the largest number of requests of a step as its capacity"
            )
        for token in wanted:
            if token in self._slot_of:
                self._slot_of.move_to_end(token)  # nothing of this step makes room for another of it
        new = [token for token in wanted if token not in self._slot_of]
        if self._batched and new:
            for token, state in zip(new, self._compute(new), strict=True):
                self._add(token, state)
        else:
            for token in new:
                self._add(token, self._compute(token))
        return [self._slot_of[token] for token in tokens]

    def forget(self) -> None:
        """Compute every state again when it is asked for next: the weights have changed.

        Example:
            >>> import torch
            >>> bank = SinkBank(lambda token: torch.full((2, 3), float(token)), capacity=2)
            >>> bank.slots([5, 7])
            [0, 1]
            >>> bank.forget()
            >>> bank.slots([7])
            [0]
        """
        self._slot_of.clear()

    def _add(self, token: int, state: Tensor) -> None:
        if self._states is None:
            self._states = state.new_zeros(self._capacity, *state.shape)
        slot = len(self._slot_of)
        if slot == self._capacity:
            _, slot = self._slot_of.popitem(last=False)
        self._states[slot] = state
        self._slot_of[token] = slot
