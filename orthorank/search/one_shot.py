"""Shortened LLaMA's one shot: score every layer alone, sort, and take the lowest scores.

Three scores: the loss with that layer alone switched (``"ppl"``, the paper's choice), Taylor (`taylor_scores`) and
magnitude. Blocks 0 to 3 and the last two are never taken: the paper's "+" heuristic, here the default of all three.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from orthorank.common.errors import OrthoRankError, check_integer
from orthorank.common.files import read_json, write_text
from orthorank.search.state import check_layers, check_losses, check_same, check_size
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.layers import LayerStack

PROTECT_FIRST, PROTECT_LAST = 4, 2
OnScore = Callable[[int, float, int, int], None]


def rank_layers(scores: Mapping[int, float], count: int) -> list[int]:
    """The ``count`` layers with the lowest scores, lowest first; of equal scores the lower layer comes first.

    Args:
        scores: by layer. count: how many layers are wanted.

    Raises:
        OrthoRankError: there are fewer layers, or one of them has no finite score.

    Example:
        >>> rank_layers({4: 2.5, 5: 2.1, 6: 2.5, 7: 9.0}, 3)
        [5, 4, 6]
    """
    if not 0 <= count <= len(scores):
        raise OrthoRankError(f"count is {count}; it must be from 0 to the number of scored layers, {len(scores)}")
    known = {layer: score if math.isfinite(score) else math.inf for layer, score in scores.items()}
    order = sorted(known, key=lambda layer: (known[layer], layer))[:count]
    if wrong := [layer for layer in order if not math.isfinite(scores[layer])]:
        raise OrthoRankError(
            f"the score of layer {wrong[0]} is {scores[wrong[0]]}, and it would be chosen; check that the model itself "
            "gives finite losses"
        )
    return order


def one_shot_candidates(
    num_layers: int, protect_first: int = PROTECT_FIRST, protect_last: int = PROTECT_LAST
) -> list[int]:
    """The layers that may be taken: all but the first four and the last two (Shortened LLaMA's "+").

    Args:
        num_layers: of the model. protect_first, protect_last: so many at either end stay.

    Raises:
        OrthoRankError: no layer is left, or a negative number.

    Example:
        >>> one_shot_candidates(10)
        [4, 5, 6, 7]
    """
    check_integer("protect_first", protect_first, 0)
    check_integer("protect_last", protect_last, 0)
    layers = list(range(protect_first, num_layers - protect_last))
    if not layers:
        raise OrthoRankError(
            f"no layer may be taken: of {num_layers} layers, {protect_first} at the beginning and {protect_last} at "
            "the end are protected; lower protect_first or protect_last"
        )
    return layers


@dataclass
class ScoreState:
    """How far a one-shot search is. Saved after each evaluation, it lets the search go on where it stopped.

    Args:
        candidates: layers that are scored, ascending.
        fingerprint: of the calibration windows and settings (`Evaluator.fingerprint`).
        scores: by layer, so far; None for one whose loss is not finite.
        batch_size: windows that run together, which the last bits depend on.
    """

    candidates: list[int]
    fingerprint: str = ""
    scores: dict[int, float | None] = field(default_factory=dict)
    batch_size: int | None = None

    @property
    def complete(self) -> bool:
        """Whether every candidate has a score."""
        return len(self.scores) == len(self.candidates)

    @property
    def finite(self) -> dict[int, float]:
        """The scores by layer, ascending, with inf where there is none."""
        return {at: math.inf if (score := self.scores[at]) is None else score for at in sorted(self.scores)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as JSON, replacing the file in one step."""
        write_text(Path(path), json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ScoreState":
        """Read a saved state.

        Raises:
            OrthoRankError: no such file, or it is not such a state.
        """
        try:
            values = read_json(Path(path))
            values["scores"] = {int(layer): score for layer, score in values["scores"].items()}
            state = cls(**values)
            check_layers(state.candidates)
            check_losses(state.scores, state.candidates)
            check_size(state.batch_size)
            return state
        except OSError as error:
            raise OrthoRankError(f"no search state can be read at {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OrthoRankError(f"{path} is not a saved one-shot search; delete it to begin anew") from error


class ScoringInterrupted(KeyboardInterrupt):
    """Ctrl-C while layers are scored. ``state`` holds the scores until then; pass it on to continue."""

    def __init__(self, state: ScoreState) -> None:
        super().__init__(f"interrupted after {len(state.scores)} of {len(state.candidates)} evaluations")
        self.state = state


def loss_scores(
    evaluator: Evaluator,
    candidates: Iterable[int],
    *,
    state: ScoreState | None = None,
    on_score: OnScore | None = None,
    save_to: str | os.PathLike[str] | None = None,
) -> ScoreState:
    """The calibration loss with each layer alone switched: the order of perplexities (Shortened LLaMA, "PPL").

    Args:
        evaluator: the loss; its keep ratio says what "switched" means: removed, or selecting tokens.
        candidates: layers to score, such as `one_shot_candidates`.
        state: of an earlier run with the same arguments, to be continued.
        on_score: called after each evaluation as ``on_score(layer, loss, done, total)``.
        save_to: a file that gets the state as JSON after each evaluation.

    Returns:
        The state; `rank_layers` of its scores gives the layers to take.

    Raises:
        OrthoRankError: ``state`` is of another search.
        ScoringInterrupted: Ctrl-C.

    Example:
        >>> import torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=8,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> evaluator = Evaluator(LayerStack(LlamaForCausalLM(config).eval()), torch.arange(32)[None], keep_ratio=0)
        >>> state = loss_scores(evaluator, one_shot_candidates(8))
        >>> sorted(rank_layers(state.finite, 2))
        [4, 5]
    """
    fresh = ScoreState(sorted(candidates), evaluator.fingerprint)
    state = fresh if state is None else state
    check_same(state, fresh, "candidates", "fingerprint")
    evaluator.go_on_with(state.batch_size)
    state.batch_size = evaluator.batch_size
    evaluator.start([], state.candidates)
    try:
        for layer in [candidate for candidate in state.candidates if candidate not in state.scores]:
            loss = evaluator.loss([layer])
            state.scores[layer] = loss if math.isfinite(loss) else None
            if save_to is not None and evaluator.processes.rank == 0:
                state.save(save_to)
            if on_score is not None:
                on_score(layer, loss, len(state.scores), len(state.candidates))
    except KeyboardInterrupt as stop:
        raise ScoringInterrupted(state) from stop
    return state


def magnitude_scores(stack: LayerStack) -> dict[int, float]:
    """Sum of the absolute weights of each layer, norms included (Shortened LLaMA, "Mag").

    Args:
        stack: of the model, `orthorank.stack.layers.LayerStack`.

    Returns:
        The scores by layer; the lowest is least important.

    Raises:
        OrthoRankError: a layer's weights are not here (offloaded) or are packed integers.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from orthorank.stack.layers import LayerStack
        >>> config = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=4,
        ...                      num_attention_heads=2, num_key_value_heads=1)
        >>> len(magnitude_scores(LayerStack(LlamaForCausalLM(config))))
        4
    """
    scores = {}
    for layer in range(stack.num_layers):
        sums = [weight.detach().abs().sum(dtype=torch.float64).item() for weight in layer_weights(stack, layer)]
        scores[layer] = sum(sums)
    return scores


def layer_weights(stack: LayerStack, layer: int) -> list[nn.Parameter]:
    """The parameters of a layer.

    Raises:
        OrthoRankError: they are on the meta device (offloaded), or not floating point (quantised).
    """
    weights = list(stack.decoder.layers[layer].named_parameters())
    for name, weight in weights:
        if weight.device.type == "meta":
            raise OrthoRankError(
                f"{name} of layer {layer} is offloaded, and its score is made of its weights; load the model without "
                "offloading, or take the metric ppl"
            )
        if not weight.is_floating_point():
            raise OrthoRankError(
                f"{name} of layer {layer} is {weight.dtype}, and its score is made of its weights; load the model "
                "without quantisation, or take the metric ppl"
            )
    return [weight for _, weight in weights]
