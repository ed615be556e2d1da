"""The fast search: who sees how many windows, what is reported, and that it goes on where it stopped."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError
from orthorank.search import Evaluator, SearchInterrupted, SearchState, greedy_search, halving_stages
from orthorank.stack.layers import LayerStack
from tests.orthorank.plain_search import LAYERS, plain_loss, random_windows, small_stack

CANDIDATES = list(range(1, LAYERS - 1))


@pytest.fixture(scope="module")
def stack() -> LayerStack:
    return small_stack()


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return random_windows(8)


def plain_halving(stack: LayerStack, windows: Tensor, rounds: int, keep_ratio: float) -> tuple[list[int], list[float]]:
    """Successive halving as it is written down, without any reuse; the worse half on the first windows then rests."""
    chosen: list[int] = []
    losses: list[float] = []
    resting: list[int] = []
    for _ in range(rounds):
        alive = [layer for layer in CANDIDATES if layer not in chosen and layer not in resting]
        seen = 1  # an eighth of the windows
        first: dict[int, float] = {}
        while True:
            means = {
                layer: plain_loss(stack, windows[:seen], dict.fromkeys([*chosen, layer], keep_ratio)) for layer in alive
            }
            first = first or means
            if seen == len(windows):
                break
            alive = sorted(alive, key=lambda layer: (means[layer], layer))[: math.ceil(len(alive) / 2)]
            seen *= 2
        best = min(alive, key=lambda layer: (means[layer], layer))
        chosen.append(best)
        losses.append(means[best])
        others = sorted((layer for layer in first if layer != best), key=lambda layer: (first[layer], layer))
        resting = others[math.ceil(len(others) / 2) :]
    return chosen, losses


@pytest.mark.parametrize(
    ("arguments", "stages"),
    [
        ((16, 4), [(1, 16), (2, 8), (4, 4)]),
        ((16, 32), [(4, 16), (8, 8), (16, 4), (32, 2)]),
        ((5, 8), [(1, 5), (2, 3), (4, 2), (8, 1)]),
        ((1, 4), [(1, 1), (2, 1), (4, 1)]),
        ((16, 1), [(1, 16)]),
        ((16, 4, 4), [(4, 16)]),  # one batch: nothing to halve
        ((16, 5, 2), [(2, 16), (4, 8), (5, 4)]),
    ],
)
def test_stages(arguments: tuple[int, ...], stages: list[tuple[int, int]]) -> None:
    assert halving_stages(*arguments) == stages


@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
def test_the_same_as_plain_halving(stack: LayerStack, windows: Tensor, keep_ratio: float) -> None:
    chosen, losses = plain_halving(stack, windows, 3, keep_ratio)
    evaluator = Evaluator(stack, windows, keep_ratio=keep_ratio, batch_size=1)
    seen: list[tuple[int, int]] = []
    state = greedy_search(evaluator, CANDIDATES, 3, fast=True, on_evaluation=lambda *values: seen.append(values[4:]))
    assert (state.chosen, state.losses) == (chosen, losses)
    assert state.losses == [
        plain_loss(stack, windows, dict.fromkeys(state.chosen[: count + 1], keep_ratio)) for count in range(3)
    ], "on all windows"
    assert seen == [(done, state.total) for done in range(1, state.total + 1)]
    assert state.total == (5 + 3 + 2 + 1) + (2 + 1 + 1 + 1) + (3 + 2 + 1 + 1)


def test_what_it_computes(stack: LayerStack, windows: Tensor) -> None:
    class Counting(LayerStack):
        losses_of_windows = 0

        def loss_parts(self, hidden: Tensor, ids: Tensor) -> Any:
            self.losses_of_windows += len(ids)
            yield from super().loss_parts(hidden, ids)

    counting = Counting(stack.model)
    greedy_search(Evaluator(counting, windows, batch_size=1), CANDIDATES, 2, fast=True)
    # 5 candidates see one window, 3 another, 2 two more, 1 four more; then two of four sit out, and 2, 1, 1, 1 see them
    assert counting.losses_of_windows == (5 + 3 + 2 * 2 + 4) + (2 + 1 + 2 + 4)


@pytest.mark.parametrize("stop_at", [1, 5, 6, 8, 11, 12, 16])
def test_interrupted_and_continued(stack: LayerStack, windows: Tensor, tmp_path: Path, stop_at: int) -> None:
    path = tmp_path / "state.json"
    whole = greedy_search(Evaluator(stack, windows, batch_size=1), CANDIDATES, 3, fast=True)
    count = 0

    def stop(*_: float) -> None:
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(SearchInterrupted, match=f"after {stop_at} of 23"):
        greedy_search(
            Evaluator(stack, windows, batch_size=1), CANDIDATES, 3, fast=True, on_evaluation=stop, save_to=path
        )
    loaded = SearchState.load(path)
    count = -100
    state = greedy_search(
        Evaluator(stack, windows, batch_size=1), CANDIDATES, 3, fast=True, state=loaded, on_evaluation=stop
    )
    assert state == whole
    assert count == -100 + 23 - stop_at, "nothing is repeated"


def test_a_fast_search_is_not_continued_as_an_exact_one(stack: LayerStack, windows: Tensor) -> None:
    state = greedy_search(Evaluator(stack, windows), CANDIDATES, 1, fast=True)
    with pytest.raises(OrthoRankError, match="its fast is True and this search's is False"):
        greedy_search(Evaluator(stack, windows), CANDIDATES, 1, state=state)


def test_candidates_without_a_finite_loss_are_not_chosen(windows: Tensor) -> None:
    stack = small_stack()
    with torch.no_grad():
        stack.decoder.layers[2].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(OrthoRankError, match="infinite or NaN"):
        greedy_search(Evaluator(stack, windows, keep_ratio=0.0), [1, 3, 4], 1, fast=True)
    # without layer 2 the loss is finite; all others are NaN at every stage
    assert greedy_search(Evaluator(stack, windows, keep_ratio=0.0), CANDIDATES, 1, fast=True).chosen == [2]


def test_states_of_other_versions(stack: LayerStack, windows: Tensor, tmp_path: Path) -> None:
    """A file of the first layout goes on; one of a layout to come is refused by name."""
    path = tmp_path / "state.json"
    evaluator = Evaluator(stack, windows[:4], batch_size=1)
    whole = greedy_search(Evaluator(stack, windows[:4], batch_size=1), CANDIDATES, 2)
    first = [evaluator.loss([layer]) for layer in CANDIDATES]
    old = {
        "candidates": CANDIDATES,
        "rounds": 2,
        "fingerprint": evaluator.fingerprint,
        "chosen": [],
        "losses": [],
        "current": {str(layer): loss for layer, loss in zip(CANDIDATES[:3], first, strict=False)},
    }
    path.write_text(json.dumps(old))
    state = greedy_search(evaluator, CANDIDATES, 2, state=SearchState.load(path))
    assert (state.chosen, state.losses) == (whole.chosen, whole.losses)
    path.write_text(json.dumps(old | {"schema": 3}))
    with pytest.raises(OrthoRankError, match=r"newer version of this package \(schema 3, and this one reads up to 2\)"):
        SearchState.load(path)


def test_the_batch_size_of_a_saved_search_is_taken_over(stack: LayerStack, windows: Tensor) -> None:
    """How many windows run together decides the last bits, and memory may have changed since."""
    state = greedy_search(Evaluator(stack, windows, batch_size=3), CANDIDATES, 2)
    begun = SearchState(CANDIDATES, 2, state.fingerprint, state.chosen[:1], state.losses[:1], batch_size=3, windows=8)
    with pytest.raises(OrthoRankError, match="3 windows in a batch and the evaluator has 2"):
        greedy_search(Evaluator(stack, windows, batch_size=2), CANDIDATES, 2, state=begun)
    automatic = Evaluator(stack, windows)
    assert automatic.batch_size == 2
    assert greedy_search(automatic, CANDIDATES, 2, state=begun).losses == state.losses
    assert automatic.batch_size == 3
