"""SLEB's greedy search: in each round, switch the layer whose switching hurts least, and keep it.

With ``keep_ratio`` 0 a switched layer is removed and this is SLEB; above 0 it selects tokens and this is SLEB +
OrthoRank (paper, section 3.2). Rounds x candidates evaluations of the calibration loss; see `Evaluator` for what is
not computed again.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator

from orthorank.common.errors import OrthoRankError
from orthorank.search.state import OnEvaluation, SearchInterrupted, SearchState, check_same, evaluation_count
from orthorank.stack.evaluator import Evaluator


def greedy_search(
    evaluator: Evaluator,
    candidates: Iterable[int],
    rounds: int,
    *,
    fast: bool = False,
    state: SearchState | None = None,
    on_evaluation: OnEvaluation | None = None,
    save_to: str | os.PathLike[str] | None = None,
    until: Callable[[SearchState], bool] | None = None,
) -> SearchState:
    """Choose ``rounds`` of the candidate layers one by one, each time the one that raises the loss least.

    A strictly smaller loss wins, so the lowest layer does at a tie.

    Args:
        evaluator: the calibration loss; its keep ratio and criterion say what "switched" means.
        candidates: layers that may be switched: `orthorank.stack.sink.candidate_layers`, or for SLEB's own setting
            ``range(1, num_layers - 1)``, which protects the first and the last layer.
        rounds: layers to switch; see `layer_count`.
        fast: whether all candidates see a few windows only, the best half twice as many, and so on to the best few on
            all windows; the half that was worse on the first windows sits out one round. Not exact: a candidate that is
            best on all windows may be out before. The losses that are reported are on all windows.
        state: of an earlier search with the same arguments, to be continued.
        on_evaluation: called after each evaluation as ``on_evaluation(round, candidate, loss, best, done, total)``:
            the round from 0, the layer, its loss (inf: given up, another is better), the round's smallest loss so
            far, and how many of all evaluations are done.
        save_to: a file that gets the state as JSON after each evaluation.
        until: asked before each round, with the state; the search ends where it says True.

    Returns:
        The final state; ``state.plan`` are the layers, ``state.losses[-1]`` is the loss.

    Raises:
        OrthoRankError: candidates or rounds out of range, or ``state`` is of another search.
        SearchInterrupted: Ctrl-C; its ``state`` holds the completed rounds.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> evaluator = Evaluator(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None])
        >>> state = greedy_search(evaluator, range(2, 5), rounds=2)
        >>> len(state.plan), state.done
        (2, 5)
    """
    state = begin_search(evaluator, candidates, rounds, fast=fast, state=state)
    try:
        while not state.complete and not (until is not None and until(state)):
            greedy_round(evaluator, state, on_evaluation=on_evaluation, save_to=save_to)
    except KeyboardInterrupt as stop:
        raise SearchInterrupted(state) from stop
    return state


def greedy_round(
    evaluator: Evaluator,
    state: SearchState,
    *,
    on_evaluation: OnEvaluation | None = None,
    save_to: str | os.PathLike[str] | None = None,
) -> None:
    """Go on with the running round of ``state`` until its layer is switched.

    Args:
        state: from `begin_search`; changed in place.
        evaluator, on_evaluation, save_to: as for `greedy_search`.
    """
    number, remaining = len(state.chosen), state.remaining
    evaluator.start(state.chosen, remaining)
    evaluations = fast_evaluations if state.fast else _evaluations
    for layer, loss, over in evaluations(evaluator, state):
        state.current[layer] = loss if math.isfinite(loss) else None
        best, done = state.best[0], state.done
        if over:
            _finish(state)
        if save_to is not None and evaluator.processes.rank == 0:
            state.save(save_to)
        if on_evaluation is not None:
            on_evaluation(number, layer, loss, best, done, state.total)
    if number == len(state.chosen):  # it was interrupted between its last evaluation and this
        _finish(state)


def begin_search(
    evaluator: Evaluator,
    candidates: Iterable[int],
    rounds: int,
    *,
    fast: bool = False,
    state: SearchState | None = None,
) -> SearchState:
    """The state from which `greedy_round` goes on. Errors as for `greedy_search`.

    Args:
        evaluator, candidates, rounds, fast, state: as for `greedy_search`.
    """
    layers = sorted(candidates)
    if len(set(layers)) < len(layers):
        raise OrthoRankError(f"candidates is {layers}; a layer is listed twice")
    if wrong := [layer for layer in layers if not 0 <= layer < evaluator.stack.num_layers]:
        raise OrthoRankError(f"candidates holds {wrong[0]}; the model has layers 0 to {evaluator.stack.num_layers - 1}")
    evaluation_count(len(layers), rounds)  # raises when there are too few candidates
    fresh = SearchState(layers, rounds, evaluator.fingerprint, fast=fast)
    if state is None:
        state = fresh
    else:
        check_same(state, fresh, "candidates", "rounds", "fingerprint", "fast")
        evaluator.go_on_with(state.batch_size)
    state.windows, state.batch_size = evaluator.windows, evaluator.batch_size
    return state


def _evaluations(evaluator: Evaluator, state: SearchState) -> Iterator[tuple[int, float, bool]]:
    """Evaluate what is left of the running round: each layer, its loss, and whether the round is over.

    The layer that was best before comes first, so that others can be given up early. The order does not matter to the
    result: a loss that equals the limit is still known, and the lowest of the layers with the smallest loss wins.
    """
    left = [layer for layer in state.remaining if layer not in state.current]
    if not state.current:
        left.sort(key=lambda layer: (layer != _promising(state), layer))
    for layer in left:
        loss = evaluator.loss([*state.chosen, layer], limit=state.best[0])
        yield layer, loss, layer == left[-1]


def _promising(state: SearchState) -> int | None:
    known = [(state.known[layer], layer) for layer in state.remaining if layer in state.known]
    return min(known)[1] if known else None


def _finish(state: SearchState) -> None:
    loss, layer = state.best
    if layer is None:
        raise OrthoRankError(
            "the loss of every candidate is infinite or NaN; check that the model itself gives finite losses"
        )
    state.finish_round(loss, layer)


def fast_evaluations(evaluator: Evaluator, state: SearchState) -> Iterator[tuple[int, float, bool]]:
    """Evaluate what is left of the running round.

    A candidate that is worse than half of them on the windows seen so far is dropped, and one that was so on the first
    windows is not tried in the next round (`SearchState.entrants`). So the winner need not be the candidate with the
    smallest loss on all windows; but it has seen them all, and so have the losses that are reported.

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
