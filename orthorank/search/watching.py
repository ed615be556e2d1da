"""What a search tells its watcher: round, candidate, best loss, and the time that is left."""

import math
import time
from collections.abc import Iterable

from orthorank.common.progress import Advance, Screen
from orthorank.search.state import SearchState


class Pace:
    """How long the rest takes, from how long it took so far.

    An evaluation of layer c runs the layers from c to the end and the head, so work is counted in layers: those of low
    layers come first in a round and take longest.

    >>> Pace(30).layers([28, 29])
    5.0
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers, self.began, self.done = num_layers, time.perf_counter(), 0.0

    def layers(self, candidates: Iterable[int]) -> float:
        """The work of evaluating each of the candidates once."""
        return float(sum(self.num_layers - layer + 1 for layer in candidates))

    def left(self, work: float) -> str:
        """The time for ``work`` more, as clocks write it."""
        return duration(work * (time.perf_counter() - self.began) / self.done) if self.done else "?"


class RoundWatcher:
    """Turns the evaluations of a greedy search into progress.

    Args:
        advance, screen: who is told. state: that of the running search. num_layers: of the model.
    """

    def __init__(self, advance: Advance, screen: Screen, state: SearchState, num_layers: int) -> None:
        self.advance, self.screen, self.state = advance, screen, state
        self.pace = Pace(num_layers)

    def __call__(self, number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
        """After an evaluation; the arguments are those of `greedy_search`'s ``on_evaluation``."""
        self.pace.done += self.pace.layers([layer])
        over = len(self.state.chosen) > number
        best_layer = self.state.chosen[-1] if over else self.state.best[1]
        at = "" if best_layer is None else f" (layer {best_layer})"
        left = self.pace.left(self._work_left())
        self.advance(done, f"{left} left; round {number + 1}/{self.state.rounds}, layer {layer}; best {best:.4f}{at}")
        if over:
            rest = "" if self.state.complete else f"; about {left} left"
            self.screen.say(
                f"round {number + 1} of {self.state.rounds}: best loss {self.state.losses[-1]:.4f}{at}{rest}"
            )

    def _work_left(self) -> float:
        remaining = self.state.remaining
        if self.state.complete:
            return 0.0
        mean = self.pace.layers(remaining) / len(remaining)
        if self.state.fast:  # how many of which layer is not known before
            return (self.state.total - self.state.done) * mean
        in_round = [layer for layer in remaining if layer not in self.state.current]
        rounds = self.state.rounds - len(self.state.chosen)
        later = sum(len(remaining) - i for i in range(1, rounds))
        return self.pace.layers(in_round) + later * mean


class ScoreWatcher:
    """Turns the evaluations of a one-shot search into progress.

    Args:
        advance: who is told. candidates: that are scored, in this order. num_layers: of the model.
    """

    def __init__(self, advance: Advance, candidates: list[int], num_layers: int) -> None:
        self.advance, self.candidates, self.pace = advance, candidates, Pace(num_layers)
        self.best, self.best_layer = math.inf, -1

    def __call__(self, layer: int, loss: float, done: int, total: int) -> None:
        """After an evaluation; the arguments are those of `loss_scores`'s ``on_score``."""
        self.pace.done += self.pace.layers([layer])
        if loss < self.best:
            self.best, self.best_layer = loss, layer
        left = self.pace.left(self.pace.layers(self.candidates[done:]))
        best = "" if self.best_layer < 0 else f"; best {self.best:.4f} (layer {self.best_layer})"
        self.advance(done, f"{left} left; layer {layer}: {loss:.4f}{best}")


def duration(seconds: float) -> str:
    """A time as clocks write it.

    >>> duration(75.2), duration(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
