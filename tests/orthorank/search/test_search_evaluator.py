"""The evaluator: what it keeps, what it computes, what it gives up, and that none of that changes a loss."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.search import Evaluator, greedy_search
from orthorank.stack.layers import LayerStack
from tests.orthorank.plain_search import LAYERS, plain_loss, random_windows, small_stack

STATE = 24 * 32 * 4  # bytes of one window's states


class Recording(LayerStack):
    """Notes which layer ran with which ratio, and how many slices of losses were computed."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.runs: list[tuple[int, float]] = []
        self.parts_of_losses = 0

    def run(self, layer: int, hidden: Tensor, inputs: Any, keep_ratio: float = 1.0, *rest: Any, **more: Any) -> Tensor:
        self.runs.append((layer, keep_ratio))
        return super().run(layer, hidden, inputs, keep_ratio, *rest, **more)

    def loss_parts(self, hidden: Tensor, ids: Tensor) -> Any:
        for part in super().loss_parts(hidden, ids):
            self.parts_of_losses += 1
            yield part


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    return small_stack()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return random_windows()


@pytest.fixture
def recording(stack: LayerStack) -> Recording:
    return Recording(stack.model)


@pytest.mark.parametrize("memory", [0, STATE, 9 * STATE, None])
def test_mixed_plans_in_any_order(stack: LayerStack, windows: Tensor, memory: int | None) -> None:
    evaluator = Evaluator(stack, windows, memory=memory)
    changes = list(itertools.product((2, 4, 5), (0.0, 0.25, 1.0)))
    for plan in ({3: 0.5}, {1: 0.0, 3: 0.5}):
        evaluator.start(plan, layers=(2, 4, 5))
        for layer, ratio in (*changes, *reversed(changes)):
            mixed = {**plan, layer: ratio}
            assert evaluator.loss(mixed) == plain_loss(stack, windows, mixed), mixed
    assert evaluator.loss([2, 3]) == plain_loss(stack, windows, {2: 1 / 3, 3: 1 / 3})
    assert evaluator.loss({}) == evaluator.loss([]) == plain_loss(stack, windows, {})


def test_states_below_a_candidate_are_not_computed_again(recording: Recording, windows: Tensor) -> None:
    evaluator = Evaluator(recording, windows[:1], keep_ratio=0.5)
    state = greedy_search(evaluator, [3, 4, 5], rounds=1)
    # layers 0 to 2 once; 3 selecting, up to the top; then from the stored input of 3 dense to 4; and so on
    assert [layer for layer, _ in recording.runs] == [0, 1, 2, 3, 4, 5, 6, 3, 4, 5, 6, 4, 5, 6]
    assert [layer for layer, ratio in recording.runs if ratio == 0.5] == [3, 4, 5]
    assert state.done == 3


@pytest.mark.parametrize("chosen", [3, 4, 5])
def test_a_round_goes_on_from_the_states_of_the_last(recording: Recording, windows: Tensor, chosen: int) -> None:
    """Below the chosen layer everything is known, also of the candidates: they start at its input."""
    evaluator = Evaluator(recording, windows[:1], keep_ratio=0.5)
    evaluator.start([], layers=(3, 4, 5))
    for layer in (3, 4, 5):
        evaluator.loss([layer])
    evaluator.start([chosen], layers={3, 4, 5} - {chosen})
    for layer in sorted({3, 4, 5} - {chosen}):
        recording.runs.clear()
        loss = evaluator.loss([chosen, layer])
        ran = [layer for layer, _ in recording.runs]
        assert ran == list(range(max(chosen, layer), LAYERS)), (chosen, layer)
        assert loss == plain_loss(recording, windows[:1], {chosen: 0.5, layer: 0.5})


def test_two_states_are_enough_for_the_moving_front(recording: Recording, windows: Tensor) -> None:
    evaluator = Evaluator(recording, windows, keep_ratio=0.5, memory=2 * len(windows) * STATE)
    evaluator.start([], layers=(2, 3, 4, 5))
    for layer in (2, 3, 4, 5):
        evaluator.loss([layer])
    once = [layer for layer, _ in recording.runs[: len(recording.runs)]]
    assert once.count(0) == once.count(1) == len(windows), "below the lowest candidate: once"
    assert len(once) == len(windows) * (2 + 5 + (1 + 4) + (1 + 3) + (1 + 2))
    recording.runs.clear()
    evaluator.start([5], layers=(2, 3, 4))
    evaluator.loss([5, 2])
    assert min(layer for layer, _ in recording.runs) == 2, "the lowest candidate's input is kept for the next round"


@pytest.mark.parametrize("memory", [0, STATE - 1, STATE, 3 * STATE, 10 * STATE, 1000 * STATE])
def test_the_budget_holds(stack: LayerStack, windows: Tensor, memory: int) -> None:
    evaluator = Evaluator(stack, windows[:2], memory=memory)
    held = []

    def note(*_: float) -> None:
        states = [state for batch in evaluator._batches.values() for state in batch.states._kept.values()]
        held.append(sum(state.untyped_storage().nbytes() for state in states))
        assert held[-1] == sum(batch.states.bytes for batch in evaluator._batches.values())

    greedy_search(evaluator, range(1, 6), 3, on_evaluation=note)
    assert max(held) <= memory
    assert memory < 2 * STATE or max(held) >= min(memory - 2 * STATE, 20 * STATE), "and it is used"


def test_some_candidates_are_given_up(recording: Recording) -> None:
    """A hopeless candidate sees fewer windows than there are, and not all tokens of the last one."""
    windows = random_windows(8)
    evaluator = Evaluator(recording, windows, keep_ratio=0.0, batch_size=1)
    full = evaluator.loss([2])
    assert recording.parts_of_losses == 8
    assert evaluator.loss([2], limit=full) == full
    assert evaluator.loss([2], limit=full * 0.999) == full, "known only when the last window was seen"
    recording.parts_of_losses = 0
    assert evaluator.loss([2], limit=full / 3) == math.inf
    assert recording.parts_of_losses < 5


def test_given_up_inside_a_window(recording: Recording, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orthorank.stack.layers.LOGITS_AT_ONCE", 64 * 5)  # slices of five tokens
    evaluator = Evaluator(recording, windows[:1])
    full = evaluator.loss([2])
    assert recording.parts_of_losses == 5
    recording.parts_of_losses = 0
    assert evaluator.loss([2], limit=full / 4) == math.inf
    assert recording.parts_of_losses <= 3
    assert evaluator.loss([2], limit=full) == full


def test_nothing_within_the_limit_is_given_up(stack: LayerStack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where the last tokens cost nothing, so that the partial sum is the whole one but for rounding."""

    class Certain(LayerStack):
        def loss_parts(self, hidden: Tensor, ids: Tensor) -> Any:
            *parts, last = super().loss_parts(hidden, ids)
            yield from (*parts, torch.zeros_like(last))

    monkeypatch.setattr("orthorank.stack.layers.LOGITS_AT_ONCE", 64)  # token by token
    for count, layer in itertools.product((1, 2, 3), range(LAYERS)):
        evaluator = Evaluator(Certain(stack.model), random_windows(count, 8), keep_ratio=0.0)
        full = evaluator.loss([layer])
        for limit in (full, math.nextafter(full, math.inf), full * (1 + 1e-12)):
            assert evaluator.loss([layer], limit) == full
        assert evaluator.loss([layer], full * (1 - 1e-8)) == math.inf


@pytest.mark.parametrize("batch_size", [2, 3, 5, 9])
def test_batched_windows(stack: LayerStack, batch_size: int) -> None:
    windows = random_windows(5)
    together = Evaluator(stack, windows, batch_size=batch_size)
    assert together.loss({3: 0.5}) == plain_loss(stack, windows, {3: 0.5}, batch_size=batch_size)
    assert together.loss({3: 0.5}) == pytest.approx(Evaluator(stack, windows, batch_size=1).loss({3: 0.5}), rel=1e-5)
    together.use_batch_size(1)
    assert together.loss({3: 0.5}) == plain_loss(stack, windows, {3: 0.5})


def test_windows_one_by_one_add_up(stack: LayerStack, windows: Tensor) -> None:
    evaluator = Evaluator(stack, windows, batch_size=1)
    some = [evaluator.window_losses([3], range(at, at + 1)) for at in range(len(windows))]
    assert sum(sum(one or [math.nan]) for one in some) / evaluator.predictions == evaluator.loss([3])


def test_evaluator_says_what_is_wrong(stack: LayerStack, windows: Tensor) -> None:
    with pytest.raises(OrthoRankError, match=r"input_ids has shape \[24\]"):
        Evaluator(stack, windows[0])
    with pytest.raises(OrthoRankError, match="keep_ratio is 1"):
        Evaluator(stack, windows, keep_ratio=1.0)
    with pytest.raises(OrthoRankError, match="batch_size is 0"):
        Evaluator(stack, windows, batch_size=0)
    with pytest.raises(OrthoRankError, match="memory is -1; it must be a number of bytes"):
        Evaluator(stack, windows, memory=-1)
    for wrong in (range(1, 4), range(2, 3), range(3), range(2, 2), range(4, 6)):
        with pytest.raises(
            OrthoRankError, match="must begin and end at multiples of the batch size, 2, or at the last"
        ):
            Evaluator(stack, windows, batch_size=2).window_losses([], wrong)
    evaluator = Evaluator(stack, windows)
    with pytest.raises(OrthoRankError, match="plan holds layer 7; the model has layers 0 to 6"):
        evaluator.loss([7])
    with pytest.raises(OrthoRankError, match=r"plan gives layer 2 the ratio 1.5"):
        evaluator.loss({2: 1.5})
    with pytest.raises(OrthoRankError, match="layers holds -1"):
        evaluator.start([], layers=[-1])
