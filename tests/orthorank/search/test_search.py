"""Layer counts, and the greedy search against the plain loop."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.search import (
    Evaluator,
    SearchInterrupted,
    SearchState,
    candidate_layers,
    evaluation_count,
    greedy_search,
    layer_count,
)
from orthorank.stack.layers import LayerStack
from tests.orthorank.plain_search import LAYERS, plain_search, random_windows, small_stack


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    return small_stack()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return random_windows()


@pytest.mark.parametrize(
    ("layers", "sparsity", "keep_ratio", "count"),
    [
        (30, 0.2, 1 / 3, 9),
        (30, 0.2, 0, 6),
        (32, 0.2, 1 / 3, 9),
        (32, 0.2, 0, 6),
        (40, 0.2, 1 / 3, 12),
        (40, 0.2, 0, 8),
        (80, 0.2, 1 / 3, 24),
        (80, 0.2, 0, 16),
        (40, 0.1, 1 / 3, 6),
        (40, 0.1, 0, 4),
        (32, 0.1, 1 / 3, 4),  # 4.8 rounded down; 5 layers would be 10.4 %
    ],
)
def test_layer_counts(layers: int, sparsity: float, keep_ratio: float, count: int) -> None:
    assert layer_count(layers, sparsity, keep_ratio) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 0.2, 0.0), "num_layers is 0"),
        ((30, 20, 0.0), "sparsity is 20"),
        ((30, 0.0, 0.0), "sparsity is 0"),
        ((30, 0.2, 1.0), "keep_ratio is 1"),
        ((30, 0.8, 0.5), "needs 48 layers"),
        ((30, math.nan, 0.0), "sparsity is nan"),
        ((30, "0.2", 0.0), "sparsity is '0.2'; it must be above 0 and below 1"),
        ((30, None, 0.0), "sparsity is None; it must be"),
        ((30, 0.2, 10**400), "keep_ratio is an integer of 1,329 bits; it must be from 0 to below 1"),
    ],
)
def test_layer_count_says_what_is_wrong(arguments: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        layer_count(*arguments)


def test_candidates() -> None:
    assert candidate_layers(11, 30) == list(range(12, 28))
    assert candidate_layers(11, 30, protect_last=1) == list(range(12, 29))
    assert candidate_layers(0, 30, protect_last=1) == list(range(1, 29)), "SLEB: all but the first and the last"
    with pytest.raises(OrthoRankError, match="no layer is left"):
        candidate_layers(27, 30)
    with pytest.raises(OrthoRankError, match="sink layer is 30"):
        candidate_layers(30, 30)


@pytest.mark.parametrize("memory", [0, 2 * 4 * 24 * 32 * 4, None])
@pytest.mark.parametrize("criterion", ["orthogonal", "inverse"])
@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
def test_same_plan_and_losses_as_the_plain_loop(
    stack: LayerStack, windows: Tensor, keep_ratio: float, criterion: str, memory: int | None
) -> None:
    """With ``keep_ratio`` 0 the plain loop is SLEB's: the plan, and every bit of every loss that is measured."""
    candidates, rounds = list(range(1, LAYERS - 1)), 3
    chosen, losses, all_losses = plain_search(stack, windows, candidates, rounds, keep_ratio, criterion)
    seen: dict[tuple[int, int], float] = {}

    def note(number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
        seen[number, layer] = loss
        assert done == len(seen)
        assert total == rounds * (LAYERS - 2) - rounds * (rounds - 1) // 2
        assert best == min(value for (of, _), value in seen.items() if of == number)

    evaluator = Evaluator(stack, windows, keep_ratio=keep_ratio, criterion=criterion, memory=memory)
    state = greedy_search(evaluator, candidates, rounds, on_evaluation=note)
    assert state.chosen == chosen
    assert state.losses == losses, "bit for bit"
    assert state.plan == sorted(chosen)
    assert seen.keys() == all_losses.keys(), "the number of evaluations is SLEB's"
    for key, loss in seen.items():
        assert loss in (all_losses[key], math.inf), key
        if loss == math.inf:
            assert all_losses[key] > losses[key[0]], "a candidate that was given up is worse than the chosen one"


def test_sleb_removes_what_a_model_without_the_layers_does_not_miss(windows: Tensor) -> None:
    """The loop of SLEB on the model itself: delete the layers from it, and take the loss of its own forward."""
    import torch

    stack = small_stack()
    model, layers = stack.model, list(stack.decoder.layers)
    chosen: list[int] = []
    for _ in range(3):
        losses = {}
        for candidate in range(1, LAYERS - 1):
            if candidate in chosen:
                continue
            kept = [layer for at, layer in enumerate(layers) if at not in (*chosen, candidate)]
            model.model.layers = torch.nn.ModuleList(kept)
            with torch.no_grad():
                losses[candidate] = model(input_ids=windows, labels=windows, use_cache=False).loss.item()
        chosen.append(min(losses, key=lambda layer: losses[layer]))
    model.model.layers = torch.nn.ModuleList(layers)
    state = greedy_search(Evaluator(LayerStack(model), windows, keep_ratio=0.0), range(1, LAYERS - 1), 3)
    assert state.chosen == chosen


def test_the_layer_that_was_best_before_comes_first(stack: LayerStack, windows: Tensor) -> None:
    """It makes the limit tight; the others follow in the order of the layers."""
    losses: dict[tuple[int, int], float] = {}

    def note(number: int, layer: int, loss: float, *_: float) -> None:
        losses[number, layer] = loss

    state = greedy_search(Evaluator(stack, windows), range(1, LAYERS - 1), 3, on_evaluation=note)
    known: dict[int, float] = {}
    for number in range(3):
        order = [layer for of, layer in losses if of == number]
        hopes = [layer for layer in order if layer in known]
        first = min(hopes, key=lambda layer: known[layer]) if hopes else order[0]
        assert order == [first, *sorted(set(order) - {first})]
        assert number == 0 or (order != sorted(order)) == (first != min(order))
        known |= {layer: losses[number, layer] for layer in order if losses[number, layer] < math.inf}
    assert state.known == known
    assert any(order != sorted(order) for order in ([la for of, la in losses if of == n] for n in (1, 2)))


def test_interrupted_and_continued(stack: LayerStack, windows: Tensor, tmp_path: Path) -> None:
    """Ctrl-C leaves the completed rounds; the saved state goes on to the same result without repeating anything."""
    path = tmp_path / "state.json"
    candidates = range(1, LAYERS - 1)
    whole = greedy_search(Evaluator(stack, windows), candidates, 3)
    seen: list[tuple[int, int]] = []

    def stop_in_round_2(number: int, layer: int, *rest: float) -> None:
        seen.append((number, layer))
        if len(seen) == 7:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted, match="after 7 of 12") as stopped:
        greedy_search(Evaluator(stack, windows), candidates, 3, on_evaluation=stop_in_round_2, save_to=path)
    assert stopped.value.state.plan == sorted(whole.chosen[:1])
    assert isinstance(stopped.value, KeyboardInterrupt)
    loaded = SearchState.load(path)
    assert loaded == stopped.value.state
    rest: list[tuple[int, int]] = []
    state = greedy_search(
        Evaluator(stack, windows), candidates, 3, state=loaded, on_evaluation=lambda r, c, *_: rest.append((r, c))
    )
    assert (state.chosen, state.losses) == (whole.chosen, whole.losses)
    assert len(rest) == 12 - 7
    assert not set(rest) & set(seen)
    json.dumps(state.__dict__)


def test_a_state_of_another_search_is_refused(stack: LayerStack, windows: Tensor) -> None:
    state = SearchState([1, 2, 3], 1, Evaluator(stack, windows).fingerprint)
    with pytest.raises(OrthoRankError, match="candidates is"):
        greedy_search(Evaluator(stack, windows), [1, 2], 1, state=state)
    with pytest.raises(OrthoRankError, match="fingerprint is"):
        greedy_search(Evaluator(stack, windows + 1 - 1, keep_ratio=0.5), [1, 2, 3], 1, state=state)
    with pytest.raises(OrthoRankError, match="fingerprint is"):
        greedy_search(Evaluator(stack, windows.flip(0)), [1, 2, 3], 1, state=state)


def test_ties_go_to_the_lower_layer(stack: LayerStack, windows: Tensor) -> None:
    class Flat(Evaluator):
        def loss(self, plan: Any, limit: float = math.inf) -> float:
            loss = 1.0 if plan[-1] in (3, 4) else 2.0
            return loss if loss <= limit else math.inf

    assert greedy_search(Flat(stack, windows), [2, 3, 4], 2).chosen == [3, 4]


def test_search_says_what_is_wrong(stack: LayerStack, windows: Tensor, tmp_path: Path) -> None:
    evaluator = Evaluator(stack, windows)
    with pytest.raises(OrthoRankError, match="rounds is 4"):
        greedy_search(evaluator, [1, 2, 3], 4)
    with pytest.raises(OrthoRankError, match="listed twice"):
        greedy_search(evaluator, [1, 1], 1)
    with pytest.raises(OrthoRankError, match="candidates holds 9; the model has layers 0 to 6"):
        greedy_search(evaluator, [9, 10], 1)
    with pytest.raises(OrthoRankError, match="no search state can be read"):
        SearchState.load(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(OrthoRankError, match="not a saved search state"):
        SearchState.load(tmp_path / "other.json")


def test_infinite_losses_are_an_error_not_a_plan(stack: LayerStack, windows: Tensor) -> None:
    class Broken(Evaluator):
        def loss(self, plan: Any, limit: float = math.inf) -> float:
            return math.inf

    with pytest.raises(OrthoRankError, match="infinite or NaN"):
        greedy_search(Broken(stack, windows), [1, 2], 1)


def test_evaluations_of_sleb() -> None:
    for layers, rounds in ((30, 6), (32, 9), (80, 24)):
        expected = sum(layers - 2 - done for done in range(rounds))
        assert evaluation_count(layers - 2, rounds) == expected == rounds * (layers - 2) - rounds * (rounds - 1) // 2
