"""What a search tells its watcher: round, candidate, best loss, and the time that is left."""

import math
import time
from collections.abc import Sequence

from orthorank.demo.screen import Advance, Screen
from orthorank.search.counts import evaluation_count


class Watcher:
    """Turns evaluations into progress.

    An evaluation of layer c runs the layers from c to the end, so the time left is estimated from layers, not from
    evaluations: those of low layers come first in a round and take longest.

    Args:
        advance, screen: who is told. candidates, rounds: of the search. num_layers: of the model.
    """

    def __init__(
        self, advance: Advance, screen: Screen, candidates: Sequence[int], rounds: int, num_layers: int
    ) -> None:
        self.advance, self.screen = advance, screen
        self.candidates, self.rounds, self.num_layers = list(candidates), rounds, num_layers
        self.began, self.work = time.perf_counter(), 0.0
        self.best_layer: int | None = None
        self.number = -1

    def __call__(self, number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
        """After an evaluation; the arguments are those of `greedy_search`'s ``on_evaluation``."""
        if number != self.number:
            self.number, self.best_layer = number, None
        self.work += self._cost([layer])
        if loss <= best and math.isfinite(loss):
            self.best_layer = layer
        left = duration(self.seconds_left(number, layer, done))
        at = f" (layer {self.best_layer})" if self.best_layer is not None else ""
        self.advance(done, f"round {number + 1} of {self.rounds}, layer {layer}; best {best:.4f}{at}; {left} left")
        if done == evaluation_count(len(self.candidates), number + 1):
            time_left = f"; about {left} left" if done < total else ""
            self.screen.say(f"round {number + 1} of {self.rounds}: best loss {best:.4f}{at}{time_left}")

    def seconds_left(self, number: int, layer: int, done: int) -> float:
        """The work that remains at the pace so far."""
        count = len(self.candidates)
        in_round = count - number - (done - evaluation_count(count, number))
        above = [c for c in self.candidates if c > layer] or [layer]
        work = in_round * self._cost(above) / len(above)
        later = sum(count - r for r in range(number + 1, self.rounds))
        work += later * self._cost(self.candidates) / count
        return work * (time.perf_counter() - self.began) / self.work

    def _cost(self, layers: Sequence[int]) -> float:
        return float(sum(self.num_layers - layer + 1 for layer in layers))  # one more: the head


def duration(seconds: float) -> str:
    """A time as clocks write it.

    >>> duration(75.2), duration(3675)
    ('1:15', '1:01:15')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
