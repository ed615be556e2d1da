"""How far a greedy search is, as a file from which it goes on."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError, shown
from orthorank.common.files import read_json, write_text

OnEvaluation = Callable[[int, int, float, float, int, int], None]

SCHEMA = 2  # 1 had no batch size and no fast search


@dataclass
class SearchState:
    """How far a greedy search is. Saved after each evaluation, it lets the search go on where it stopped.

    Args:
        candidates: layers that may be switched, ascending.
        rounds: layers to switch in all.
        fingerprint: of the calibration windows and settings (`Evaluator.fingerprint`).
        chosen: layers switched so far, in the order of the rounds.
        losses: the plan's loss on all windows after each completed round.
        current: losses of the running round, by layer; None for one given up because another was better.
        known: the last loss that was measured for each layer; the most promising one is evaluated first.
        fast: whether the search halves the candidates while it doubles the windows.
        windows: calibration windows; batch_size: how many of them run together, which the last bits depend on.
        sums: in a fast search, the losses of each window of the running round so far, by layer; first: the loss on the
            first windows in the round before, of those that took part.
        schema: version of this layout.
    """

    candidates: list[int]
    rounds: int
    fingerprint: str = ""
    chosen: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    current: dict[int, float | None] = field(default_factory=dict)
    known: dict[int, float] = field(default_factory=dict)
    fast: bool = False
    windows: int | None = None
    batch_size: int | None = None
    sums: dict[int, list[float]] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def plan(self) -> list[int]:
        """The layers of the completed rounds, ascending: the best plan of that size that the search found."""
        return sorted(self.chosen)

    @property
    def complete(self) -> bool:
        """Whether all rounds are done."""
        return len(self.chosen) == self.rounds

    @property
    def remaining(self) -> list[int]:
        """The candidates that are not chosen, ascending."""
        return [layer for layer in self.candidates if layer not in self.chosen]

    @property
    def entrants(self) -> list[int]:
        """Who takes part in the running round, ascending: all that remain.

        In a fast search the worse half of those that took part in the round before sits out one round, by the losses on
        the first windows: what hurt most then rarely hurts least now.
        """
        ranked = sorted((loss, layer) for layer, loss in self.first.items() if layer not in self.chosen)
        rests = {layer for _, layer in ranked[len(ranked) - len(ranked) // 2 :]}
        return [layer for layer in self.remaining if layer not in rests]

    @property
    def total(self) -> int:
        """Evaluations that the whole search takes."""
        return self._evaluations(self.rounds)

    @property
    def done(self) -> int:
        """Evaluations made so far."""
        running = len(self.current)
        if self.fast:
            stages = self.stages(len(self.entrants)) if self.sums else []
            running = sum(len(sums) >= windows for windows, _ in stages for sums in self.sums.values())
        return self._evaluations(len(self.chosen)) + running

    @property
    def best(self) -> tuple[float, int | None]:
        """Smallest loss of the running round and its layer; (inf, None) before the first evaluation.

        In a fast search: among the candidates that have seen most windows.
        """
        most = max(map(len, self.sums.values()), default=0)
        layers = [layer for layer in self.current if len(self.sums.get(layer, [])) == most]
        known = [(loss, layer) for layer in layers if (loss := self.current[layer]) is not None]
        return min(known, default=(math.inf, None))

    def stages(self, candidates: int) -> list[tuple[int, int]]:
        """Of a round of the fast search: how many windows are seen, by how many of the ``candidates``."""
        return halving_stages(candidates, self.windows or 1, self.batch_size or 1)

    def finish_round(self, loss: float, layer: int) -> None:
        """Switch ``layer`` for good."""
        known = self.known | {at: value for at, value in self.current.items() if value is not None}
        chosen, losses = [*self.chosen, layer], [*self.losses, loss]
        seen = self.stages(1)[0][0]
        totals = {at: sum(sums[:seen]) for at, sums in self.sums.items()}
        first = {at: total if math.isfinite(total) else math.inf for at, total in totals.items()}
        # In one statement, so that Ctrl-C has next to no room between them.
        self.chosen, self.losses, self.known, self.first, self.current, self.sums = chosen, losses, known, first, {}, {}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as JSON, replacing the file in one step."""
        write_text(Path(path), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SearchState":
        """Read a saved state.

        Raises:
            OrthoRankError: no such file, it is not a search state, or a newer version wrote it.
        """
        wrong = f"{path} is not a saved search state; delete it to begin anew"
        try:
            values: dict[str, Any] = read_json(Path(path))
        except OSError as error:
            raise OrthoRankError(f"no search state can be read at {path}: {error.strerror}") from error
        except ValueError as error:
            raise OrthoRankError(wrong) from error
        schema = values.get("schema", 1) if isinstance(values, dict) else None
        if type(schema) is not int or schema < 1:
            raise OrthoRankError(wrong)
        if schema > SCHEMA:
            raise OrthoRankError(
                f"{path} was saved by a newer version of this package (schema {shown(schema)}, and this one reads up "
                f"to {SCHEMA}); go on with that version, or delete the file to begin anew"
            )
        try:
            for name in {"known", "sums", "first"} & values.keys() | {"current"}:
                values[name] = {int(layer): value for layer, value in values[name].items()}
            state = cls(**values | {"schema": SCHEMA})
            state._check()
            return state
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OrthoRankError(wrong) from error

    def _check(self) -> None:
        """Raises ValueError when no search can have written this."""
        check_layers(self.candidates)
        check_layers(self.chosen, self.candidates)
        check_numbers(self.losses)
        if len(self.losses) != len(self.chosen) or type(self.rounds) is not int or len(self.chosen) > self.rounds:
            raise ValueError
        for losses in (self.current, self.known, self.first):
            check_losses(losses, self.candidates)
        for sums in self.sums.values():
            check_numbers(sums)
        for size in (self.windows, self.batch_size):
            check_size(size)

    def _evaluations(self, rounds: int) -> int:
        total = len(self.candidates)
        if not self.fast:
            return evaluation_count(total, rounds)
        count, before = 0, 1
        for done in range(rounds):
            entrants = total - done - (before - 1) // 2  # of those before, the chosen one is gone and half sits out
            count += sum(number for _, number in self.stages(entrants))
            before = entrants
        return count


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search. ``state`` holds what was found until then; pass it on to continue."""

    def __init__(self, state: SearchState) -> None:
        super().__init__(f"interrupted after {state.done} of {state.total} evaluations")
        self.state = state


def evaluation_count(candidates: int, rounds: int) -> int:
    """Loss evaluations of a greedy search: ``rounds * candidates - rounds * (rounds - 1) / 2``.

    With SLEB's candidates, all layers but the first and the last, this is R(L - 2) - R(R - 1)/2.

    Args:
        candidates: how many layers may be switched. rounds: how many are.

    Raises:
        OrthoRankError: more rounds than candidates, or a negative number.

    Example:
        >>> evaluation_count(30 - 2, 6)
        153
    """
    if not 0 <= rounds <= candidates:
        raise OrthoRankError(f"rounds is {rounds}; it must be from 0 to the number of candidate layers, {candidates}")
    return rounds * candidates - rounds * (rounds - 1) // 2


def halving_stages(candidates: int, windows: int, batch_size: int = 1) -> list[tuple[int, int]]:
    """How a round of the fast search divides its work: all candidates see few windows, the best half twice as many, ...

    Successive halving (Jamieson and Talwalkar, 2016), over the calibration windows.

    Args:
        candidates: layers that may be switched in this round.
        windows: calibration windows in all; batch_size: how many run together, which is the least that is seen.

    Returns:
        For each stage, how many windows have been seen after it, and by how many candidates. The first sees an eighth
        of the windows or one batch, the last all of them.

    Example:
        >>> halving_stages(16, windows=4)
        [(1, 16), (2, 8), (4, 4)]
    """
    batches = -(-windows // batch_size)
    seen = -(-batches // 8)
    stages = [(min(seen * batch_size, windows), candidates)]
    while seen < batches:
        seen, candidates = min(2 * seen, batches), -(-candidates // 2)
        stages.append((min(seen * batch_size, windows), candidates))
    return stages


def check_same(state: Any, fresh: Any, *names: str) -> None:
    """``state``, with which a search is to go on, has the fields ``names`` of the state in which it would begin.

    Raises:
        OrthoRankError: one is another.
    """
    for name in names:
        before, now = getattr(state, name), getattr(fresh, name)
        if before != now:
            raise OrthoRankError(
                f"state is of another search: its {name} is {before} and this search's is {now}; search with the same "
                "text, windows, keep ratio and candidates, or begin anew without a state"
            )


def check_layers(layers: Any, among: Collection[int] | None = None) -> None:
    """A list of layer numbers, none of them twice, all of them in ``among``."""
    if not isinstance(layers, list) or any(type(layer) is not int or layer < 0 for layer in layers):
        raise ValueError
    if len(set(layers)) < len(layers) or (among is not None and not set(layers) <= set(among)):
        raise ValueError


def check_losses(losses: Any, among: Collection[int]) -> None:
    """Finite numbers by layer, or None where one was given up.

    >>> check_losses({12: 3.5, 13: None}, [12, 13])
    >>> check_losses({12: "3.5"}, [12, 13])
    Traceback (most recent call last):
        ...
    ValueError
    """
    if not isinstance(losses, dict) or not set(losses) <= set(among):
        raise ValueError
    check_numbers([loss for loss in losses.values() if loss is not None])


def check_numbers(numbers: Any) -> None:
    """A list of finite numbers."""
    if not isinstance(numbers, list) or not all(type(n) in (int, float) and math.isfinite(n) for n in numbers):
        raise ValueError


def check_size(size: Any) -> None:
    """An integer above 0, or None for "not known"."""
    if size is not None and (type(size) is not int or size < 1):
        raise ValueError
