"""The benchmark of the search: its bounds are those of the layers that run, and it believes nothing unseen."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from benchmarks import bench_search
from benchmarks.bench_search import bound, compare, plain_round, search_bound
from orthorank.calibration.corrected_evaluator import CorrectedEvaluator
from orthorank.common.errors import OrthoRankError
from orthorank.search import Evaluator, begin_search, candidate_layers, greedy_round, greedy_search
from orthorank.stack.flops import Dimensions
from orthorank.stack.layers import LayerStack
from orthorank_kernels import keep_count
from tests.orthorank.plain_search import LAYERS, random_windows, small_stack

TOKENS = 24


class Working(LayerStack):
    """Adds up the matrix products of what runs."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.sizes = Dimensions.of(model.config)
        self.work = 0.0

    def run(self, layer: int, hidden: Tensor, inputs: Any, keep_ratio: float = 1.0, *rest: Any, **more: Any) -> Tensor:
        if keep_ratio > 0:
            self.work += self.sizes.layer(layer, TOKENS, keep_count(TOKENS, keep_ratio))
        return super().run(layer, hidden, inputs, keep_ratio, *rest, **more)

    def loss_parts(self, hidden: Tensor, ids: Tensor) -> Any:
        self.work += 2.0 * self.sizes.hidden * self.sizes.vocabulary * (TOKENS - 1)
        yield from super().loss_parts(hidden, ids)


@pytest.fixture
def stack() -> Working:
    return Working(small_stack().model)


@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
@pytest.mark.parametrize("candidates", [[1, 2, 3, 4, 5], [3, 4, 5]])
def test_the_bound_of_a_search_is_what_runs(stack: Working, keep_ratio: float, candidates: list[int]) -> None:
    """One window of one slice: nobody is given up, so the search does just what the bound counts."""
    windows = random_windows(1, TOKENS)
    state = greedy_search(Evaluator(stack, windows, keep_ratio=keep_ratio), candidates, 3)
    reused, stack.work = stack.work, 0.0
    again = begin_search(Evaluator(stack, windows, keep_ratio=keep_ratio), candidates, 3)
    for _ in range(3):
        losses = plain_round(stack, windows, again, keep_ratio, batch_size=1)
        again.finish_round(min(losses.values()), min(losses, key=lambda layer: losses[layer]))
    assert again.chosen == state.chosen
    expected = search_bound(stack.model.config, TOKENS, candidates, state.chosen, keep_ratio)
    assert stack.work / reused == pytest.approx(expected, rel=1e-9)


def test_the_bound_of_smollm2() -> None:
    """From its layer counts: candidates 12 to 27, and 1 to 27 without the sink floor."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    assert bound(config, 512, range(12, 28)) == pytest.approx(1.99, abs=0.01)
    assert bound(config, 512, range(1, 28)) == pytest.approx(1.54, abs=0.01)


def test_the_first_round_over_dense_layers_is_the_bound(stack: Working) -> None:
    """Candidates that keep all but a token: they cost nearly what dense layers do."""
    windows = random_windows(1, TOKENS)
    evaluator = Evaluator(stack, windows, keep_ratio=0.999)
    greedy_round(evaluator, begin_search(evaluator, range(3, LAYERS - 1), 1))
    base = 3 * stack.sizes.layer(0, TOKENS, TOKENS)  # below the lowest candidate, once for the whole search
    reused, stack.work = stack.work - base, 0.0
    plain_round(stack, windows, begin_search(evaluator, range(3, LAYERS - 1), 1), 0.999, batch_size=1)
    assert stack.work / reused == pytest.approx(bound(stack.model.config, TOKENS, range(3, LAYERS - 1)), rel=0.02)


def test_the_rounds_must_agree() -> None:
    plain = {1: 3.0, 2: 2.5, 3: 2.5, 4: 9.0}
    compare(plain, {1: 3.0, 2: 2.5, 3: 2.5, 4: math.inf}, 2, 2.5)
    with pytest.raises(OrthoRankError, match="the plain loop chose layer 2"):
        compare(plain, plain, 3, 2.5)
    with pytest.raises(OrthoRankError, match=r"layer 1 has loss 3\.0 by the plain loop and"):
        compare(plain, plain | {1: math.nextafter(3.0, 4)}, 2, 2.5)
    with pytest.raises(OrthoRankError, match=r"layer 3 has loss 2\.5 by the plain loop and inf"):
        compare(plain, plain | {3: math.inf}, 2, 2.5)
    with pytest.raises(OrthoRankError, match="evaluated layers"):
        compare(plain, {2: 2.5}, 2, 2.5)


def test_the_corrected_searches_fit_to_windows_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loss is that of the plan with its own maps; --fast chooses among maps that it keeps."""
    stack, every = small_stack(), random_windows(7)
    info = SimpleNamespace(name="tiny", to_dict=dict)
    monkeypatch.setattr(bench_search, "load_model", lambda *_, **__: (stack.model, None, info))
    monkeypatch.setattr(bench_search, "calibration", lambda _, windows, __: (every[:windows], "a text", ""))
    monkeypatch.setattr(bench_search, "detect_sink", lambda *_: None)
    monkeypatch.setattr(bench_search, "candidate_layers", lambda *_: candidate_layers(0, LAYERS))
    monkeypatch.setattr("sys.argv", ["", "--rounds", "2", "--windows", "3", "--correct", "4", "--fit-windows", "4"])
    found = bench_search.measure(bench_search.arguments())
    mine = CorrectedEvaluator(LayerStack(stack.model), every[:3], every[3:], rank=4, keep_ratio=1 / 3, batch_size=1)
    assert found["losses"]["corrected"][-1] == mine.loss(found["order"]["corrected"])
    first = greedy_search(mine, candidate_layers(0, LAYERS), 1)
    assert found["order"]["corrected"][0] == first.chosen[0]
    assert (
        found["order"]["exact"]
        == greedy_search(
            Evaluator(LayerStack(stack.model), every[:3], keep_ratio=1 / 3, batch_size=1),
            candidate_layers(0, LAYERS),
            2,
        ).chosen
    )
    kept = CorrectedEvaluator(
        LayerStack(stack.model), every[:3], every[3:], rank=4, refit=False, keep_ratio=1 / 3, batch_size=1
    )
    fast = greedy_search(kept, candidate_layers(0, LAYERS), 2, fast=True)
    assert (found["order"]["corrected, fast"], found["losses"]["corrected, fast"]) == (fast.chosen, fast.losses)
    assert set(found["cpu_seconds"]) == {"plain", "exact", "fast", "corrected", "corrected, fast"}
    assert (found["rank"], found["fit_tokens"]) == (4, 4 * 24)
