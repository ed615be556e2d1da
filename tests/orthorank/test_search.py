"""Layer counts, the evaluator that keeps states, and the greedy search against a plain loop."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank.errors import OrthoRankError
from orthorank.search import (
    Evaluator,
    SearchInterrupted,
    SearchState,
    candidate_layers,
    evaluation_count,
    greedy_search,
    layer_count,
)
from orthorank.stack import LayerStack

LAYERS = 7


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that the layers differ in what they are worth
    )
    return LayerStack(LlamaForCausalLM(config).eval())


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 64, (4, 24), generator=torch.Generator().manual_seed(1))


def plain_loss(stack: LayerStack, windows: Tensor, plan: Iterable[int], keep_ratio: float, criterion: str) -> float:
    """The loss of a plan, everything computed anew."""
    total = 0.0
    for ids in windows.split(1):
        inputs = stack.embed(ids)
        hidden = inputs.hidden_states
        for layer in range(stack.num_layers):
            hidden = stack.run(layer, hidden, inputs, keep_ratio if layer in plan else 1.0, criterion)
        total += stack.token_losses(hidden, ids).double().sum().item()
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def plain_search(
    stack: LayerStack, windows: Tensor, candidates: list[int], rounds: int, keep_ratio: float, criterion: str
) -> tuple[list[int], list[float], dict[tuple[int, int], float]]:
    """SLEB's loop as it is written down, without any reuse: the plan, its losses, and every loss seen."""
    chosen: list[int] = []
    losses: list[float] = []
    seen: dict[tuple[int, int], float] = {}
    for number in range(rounds):
        best, best_layer = math.inf, -1
        for layer in candidates:
            if layer in chosen:
                continue
            loss = plain_loss(stack, windows, [*chosen, layer], keep_ratio, criterion)
            seen[number, layer] = loss
            if loss < best:
                best, best_layer = loss, layer
        chosen.append(best_layer)
        losses.append(best)
    return chosen, losses, seen


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
    ],
)
def test_layer_count_says_what_is_wrong(arguments: tuple[int, float, float], words: str) -> None:
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


@pytest.mark.parametrize("criterion", ["orthogonal", "inverse"])
@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
def test_same_plan_and_losses_as_the_plain_loop(
    stack: LayerStack, windows: Tensor, keep_ratio: float, criterion: str
) -> None:
    candidates, rounds = list(range(1, LAYERS - 1)), 3
    chosen, losses, all_losses = plain_search(stack, windows, candidates, rounds, keep_ratio, criterion)
    seen: dict[tuple[int, int], float] = {}

    def note(number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
        seen[number, layer] = loss
        assert done == len(seen)
        assert total == rounds * (LAYERS - 2) - rounds * (rounds - 1) // 2
        assert best == min(value for (of, _), value in seen.items() if of == number)

    evaluator = Evaluator(stack, windows, keep_ratio=keep_ratio, criterion=criterion)
    state = greedy_search(evaluator, candidates, rounds, on_evaluation=note)
    assert state.chosen == chosen
    assert state.losses == losses, "bit for bit"
    assert state.plan == sorted(chosen)
    assert seen.keys() == all_losses.keys(), "the number of evaluations is SLEB's"
    for key, loss in seen.items():
        assert loss in (all_losses[key], math.inf), key
        if loss == math.inf:
            assert all_losses[key] > losses[key[0]], "a candidate that was given up is worse than the chosen one"


def test_some_candidates_are_given_up(stack: LayerStack) -> None:
    """The early stop does happen: a hopeless candidate sees fewer windows than there are."""
    hidden_calls = 0

    class Counting(LayerStack):
        def token_losses(self, hidden_states: Tensor, input_ids: Tensor) -> Tensor:
            nonlocal hidden_calls
            hidden_calls += 1
            return super().token_losses(hidden_states, input_ids)

    windows = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    evaluator = Evaluator(Counting(stack.model), windows, keep_ratio=0.0)
    evaluator.start([], lowest=1)
    full = evaluator.loss(2)
    assert hidden_calls == 8
    assert evaluator.loss(2, limit=full) == full, "an equal loss is not above the limit"
    hidden_calls = 0
    assert evaluator.loss(2, limit=full / 3) == math.inf
    assert hidden_calls < 8


def test_states_below_a_candidate_are_not_computed_again(stack: LayerStack, windows: Tensor) -> None:
    runs: list[tuple[int, float]] = []

    class Recording(LayerStack):
        def run(self, layer: int, *rest: Any, keep_ratio: float = 1.0, **more: Any) -> Tensor:
            runs.append((layer, keep_ratio))
            return super().run(layer, *rest, keep_ratio=keep_ratio, **more)

    evaluator = Evaluator(Recording(stack.model), windows[:1], keep_ratio=0.5)
    greedy_search(evaluator, [3, 4, 5], rounds=1)
    dense_below = [layer for layer, _ in runs if layer < 3]
    assert dense_below == [0, 1, 2], "once for the whole search"
    # 3 then 3..6; front moves over 3; 4..6; front moves over 4; 5..6
    assert [layer for layer, _ in runs][3:] == [3, 4, 5, 6, 3, 4, 5, 6, 4, 5, 6]
    assert [layer for layer, ratio in runs if ratio == 0.5] == [3, 4, 5]


def test_any_order_of_questions_gives_the_same_losses(stack: LayerStack, windows: Tensor) -> None:
    evaluator = Evaluator(stack, windows, keep_ratio=1 / 3)
    evaluator.start([4], lowest=2)
    ascending = {layer: evaluator.loss(layer) for layer in (2, 3, 5)}
    assert {layer: evaluator.loss(layer) for layer in (5, 3, 2)} == ascending
    assert evaluator.loss(3) == plain_loss(stack, windows, [3, 4], 1 / 3, "orthogonal")
    assert evaluator.loss(None) == plain_loss(stack, windows, [4], 1 / 3, "orthogonal")


def test_batched_windows_agree(stack: LayerStack, windows: Tensor) -> None:
    alone, together = (Evaluator(stack, windows, keep_ratio=0.5, batch_size=size) for size in (1, 3))
    alone.start([], lowest=1)
    together.start([], lowest=1)
    assert together.loss(3) == pytest.approx(alone.loss(3), rel=1e-5)


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
        def loss(self, candidate: int | None, limit: float = math.inf) -> float:
            return 1.0 if candidate in (3, 4) else 2.0

    assert greedy_search(Flat(stack, windows), [2, 3, 4], 2).chosen == [3, 4]


def test_search_says_what_is_wrong(stack: LayerStack, windows: Tensor, tmp_path: Path) -> None:
    evaluator = Evaluator(stack, windows)
    with pytest.raises(OrthoRankError, match="rounds is 4"):
        greedy_search(evaluator, [1, 2, 3], 4)
    with pytest.raises(OrthoRankError, match="listed twice"):
        greedy_search(evaluator, [1, 1], 1)
    with pytest.raises(OrthoRankError, match="layer 9 is not from 9 to 6"):
        greedy_search(evaluator, [9, 10], 1)
    with pytest.raises(OrthoRankError, match="call start"):
        Evaluator(stack, windows).loss(1)
    with pytest.raises(OrthoRankError, match=r"input_ids has shape \[24\]"):
        Evaluator(stack, windows[0])
    with pytest.raises(OrthoRankError, match="keep_ratio is 1"):
        Evaluator(stack, windows, keep_ratio=1.0)
    with pytest.raises(OrthoRankError, match="no search state can be read"):
        SearchState.load(tmp_path / "nothing.json")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(OrthoRankError, match="not a saved search state"):
        SearchState.load(tmp_path / "other.json")


def test_infinite_losses_are_an_error_not_a_plan(stack: LayerStack, windows: Tensor) -> None:
    class Broken(Evaluator):
        def loss(self, candidate: int | None, limit: float = math.inf) -> float:
            return math.inf

    with pytest.raises(OrthoRankError, match="infinite or NaN"):
        greedy_search(Broken(stack, windows), [1, 2], 1)


def test_evaluations_of_sleb() -> None:
    for layers, rounds in ((30, 6), (32, 9), (80, 24)):
        expected = sum(layers - 2 - done for done in range(rounds))
        assert evaluation_count(layers - 2, rounds) == expected == rounds * (layers - 2) - rounds * (rounds - 1) // 2
