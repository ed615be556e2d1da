"""A round of the fast search: successive halving of the candidates while the windows double."""

import math
from collections.abc import Iterator

from orthorank.search.state import SearchState
from orthorank.stack.evaluator import Evaluator


def fast_evaluations(evaluator: Evaluator, state: SearchState) -> Iterator[tuple[int, float, bool]]:
    """Evaluate what is left of the running round.

    Whoever is worse than half of the candidates on the windows seen so far is out, and whoever was so on the first
    windows sits out the next round (`SearchState.entrants`). So the winner need not be the candidate with the smallest
    loss on all windows; but it has seen them all, and so have the losses that are reported.

    Args:
        evaluator: started with the state's plan.
        state: its ``sums`` hold what is measured of this round, and grow.

    Yields:
        After each evaluation: the layer, its mean loss on the windows it has seen, and whether the round is over.
    """
    alive, before = state.entrants, 0
    stages = state.stages(len(alive))
    for seen, count in stages:
        alive = _best(state, alive, before, count)
        for layer in alive:
            have = state.sums.get(layer, [])
            if len(have) >= seen:  # before the search was interrupted
                continue
            new = range(len(have), seen)
            more = evaluator.window_losses([*state.chosen, layer], new)
            sums = have + ([math.inf] * len(new) if more is None else more)
            loss = sum(sums) / (seen * (evaluator.input_ids.shape[1] - 1))
            state.current[layer] = loss if math.isfinite(loss) else None
            state.sums[layer] = sums  # last: what is not here is measured again after Ctrl-C
            yield layer, loss, (seen, layer) == (stages[-1][0], alive[-1])
        before = seen


def _best(state: SearchState, layers: list[int], windows: int, count: int) -> list[int]:
    """The ``count`` best of ``layers`` on the first ``windows``, ascending; lower layers first at a tie, NaN last."""

    def key(layer: int) -> tuple[float, int]:
        total = sum(state.sums[layer][:windows]) if windows else 0.0
        return (total if math.isfinite(total) else math.inf), layer

    return sorted(sorted(layers, key=key)[:count])
