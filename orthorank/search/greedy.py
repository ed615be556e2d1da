"""SLEB's greedy search: in each round, switch the layer whose switching hurts least, and keep it.

With ``keep_ratio`` 0 a switched layer is removed and this is SLEB; above 0 it selects tokens and this is SLEB +
OrthoRank (paper, section 3.2). Rounds x candidates evaluations of the calibration loss; see `Evaluator` for what is
not computed again.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from orthorank.errors import OrthoRankError
from orthorank.search.counts import evaluation_count
from orthorank.search.evaluator import Evaluator

OnEvaluation = Callable[[int, int, float, float, int, int], None]


@dataclass
class SearchState:
    """How far a greedy search is. Saved after each evaluation, it lets the search go on where it stopped.

    Args:
        candidates: layers that may be switched, ascending.
        rounds: layers to switch in all.
        fingerprint: of the calibration windows and settings (`Evaluator.fingerprint`).
        chosen: layers switched so far, in the order of the rounds.
        losses: the plan's loss after each completed round.
        current: losses of the running round, by layer; None for one given up because another was better.
    """

    candidates: list[int]
    rounds: int
    fingerprint: str = ""
    chosen: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    current: dict[int, float | None] = field(default_factory=dict)

    @property
    def plan(self) -> list[int]:
        """The layers of the completed rounds, ascending: the best plan of that size that the search found."""
        return sorted(self.chosen)

    @property
    def complete(self) -> bool:
        """Whether all rounds are done."""
        return len(self.chosen) == self.rounds

    @property
    def total(self) -> int:
        """Evaluations that the whole search takes."""
        return evaluation_count(len(self.candidates), self.rounds)

    @property
    def done(self) -> int:
        """Evaluations made so far."""
        return evaluation_count(len(self.candidates), len(self.chosen)) + len(self.current)

    @property
    def best(self) -> tuple[float, int | None]:
        """Smallest loss of the running round and its layer; (inf, None) before the first evaluation."""
        known = [(loss, layer) for layer, loss in self.current.items() if loss is not None]
        return min(known, default=(math.inf, None))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as JSON, replacing the file in one step."""
        path = Path(path)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            part.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")
            os.replace(part, path)
        except OSError as error:
            raise OrthoRankError(f"the search state cannot be written to {path}: {error.strerror}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SearchState":
        """Read a saved state.

        Raises:
            OrthoRankError: no such file, or it is not a search state.
        """
        try:
            values: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
            values["current"] = {int(layer): loss for layer, loss in values["current"].items()}
            return cls(**values)
        except OSError as error:
            raise OrthoRankError(f"no search state can be read at {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OrthoRankError(f"{path} is not a saved search state; delete it to begin anew") from error


class SearchInterrupted(KeyboardInterrupt):
    """Ctrl-C during a search. ``state`` holds what was found until then; pass it on to continue."""

    def __init__(self, state: SearchState) -> None:
        super().__init__(f"interrupted after {state.done} of {state.total} evaluations")
        self.state = state


def greedy_search(
    evaluator: Evaluator,
    candidates: Iterable[int],
    rounds: int,
    *,
    state: SearchState | None = None,
    on_evaluation: OnEvaluation | None = None,
    save_to: str | os.PathLike[str] | None = None,
) -> SearchState:
    """Choose ``rounds`` of the candidate layers one by one, each time the one that raises the loss least.

    A strictly smaller loss wins, so the lowest layer does at a tie.

    Args:
        evaluator: the calibration loss; its keep ratio and criterion say what "switched" means.
        candidates: layers that may be switched: `orthorank.sink.candidate_layers`, or for SLEB's own setting
            ``range(1, num_layers - 1)``, which protects the first and the last layer.
        rounds: layers to switch; see `layer_count`.
        state: of an earlier search with the same arguments, to be continued.
        on_evaluation: called after each evaluation as ``on_evaluation(round, candidate, loss, best, done, total)``:
            the round from 0, the layer, its loss (inf: given up, another is better), the round's smallest loss so
            far, and how many of all evaluations are done.
        save_to: a file that gets the state as JSON after each evaluation.

    Returns:
        The final state; ``state.plan`` are the layers, ``state.losses[-1]`` is the loss.

    Raises:
        OrthoRankError: candidates or rounds out of range, or ``state`` is of another search.
        SearchInterrupted: Ctrl-C; its ``state`` holds the completed rounds.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=6,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> evaluator = Evaluator(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None])
        >>> state = greedy_search(evaluator, range(2, 5), rounds=2)
        >>> len(state.plan), state.done
        (2, 5)
    """
    layers = sorted(candidates)
    if len(set(layers)) < len(layers):
        raise OrthoRankError(f"candidates is {layers}; a layer is listed twice")
    evaluation_count(len(layers), rounds)  # raises when there are too few candidates
    fresh = SearchState(layers, rounds, evaluator.fingerprint)
    state = fresh if state is None else _continued(state, fresh)
    try:
        while not state.complete:
            _run_round(evaluator, state, on_evaluation, save_to)
    except KeyboardInterrupt as stop:
        raise SearchInterrupted(state) from stop
    return state


def _continued(state: SearchState, fresh: SearchState) -> SearchState:
    for name in ("candidates", "rounds", "fingerprint"):
        before, now = getattr(state, name), getattr(fresh, name)
        if before != now:
            raise OrthoRankError(
                f"state is of another search: its {name} is {before} and this search's is {now}; search with the same "
                "text, windows, keep ratio and candidates, or begin anew without a state"
            )
    return state


def _run_round(
    evaluator: Evaluator, state: SearchState, on_evaluation: OnEvaluation | None, save_to: str | os.PathLike[str] | None
) -> None:
    remaining = [layer for layer in state.candidates if layer not in state.chosen]
    if len(state.current) == len(remaining):  # stopped between the last evaluation and its consequence
        _finish_round(state)
        return
    evaluator.start(state.chosen, lowest=state.candidates[0])
    for layer in remaining:  # ascending: the evaluator's cheap order, and ties go to the lower layer
        if layer in state.current:
            continue
        loss = evaluator.loss(layer, limit=state.best[0])
        state.current[layer] = loss if math.isfinite(loss) else None
        best, done, number = state.best[0], state.done, len(state.chosen)
        if len(state.current) == len(remaining):
            _finish_round(state)
        if save_to is not None:
            state.save(save_to)
        if on_evaluation is not None:
            on_evaluation(number, layer, loss, best, done, state.total)


def _finish_round(state: SearchState) -> None:
    loss, layer = state.best
    if layer is None:
        raise OrthoRankError(
            "the loss of every candidate is infinite or NaN; check that the model itself gives finite losses"
        )
    # In one statement, so that Ctrl-C has next to no room between the three.
    state.chosen, state.losses, state.current = [*state.chosen, layer], [*state.losses, loss], {}
