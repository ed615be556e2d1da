"""Shortened LLaMA's scores and its sorting rule: against its published figures, and against plain autograd."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.evaluation import perplexity
from orthorank.search import Evaluator
from orthorank.search.one_shot import (
    ScoreState,
    ScoringInterrupted,
    loss_scores,
    magnitude_scores,
    one_shot_candidates,
    rank_layers,
)
from orthorank.search.taylor import taylor_scores
from orthorank.stack.layers import LayerStack

# Perplexity with one block removed, rounded to three digits after the point, by block: published with the code of
# Shortened LLaMA (output_block_sensitivity/*/ppl_n10/all_ppl_unsorted.csv).
PUBLISHED = {
    "Llama-2-7B": (
        (
            *(19177.850, 14742.753, 26.337, 24.887, 23.437, 22.488, 22.106, 21.564),
            *(21.485, 21.583, 21.606, 21.356, 21.543, 22.156, 21.714, 21.857),
            *(23.543, 22.048, 21.607, 22.355, 21.956, 21.499, 22.306, 21.750),
            *(21.486, 21.756, 22.029, 21.681, 22.273, 22.985, 24.121, 45.737),
        ),
        [11, 8, 24, 21, 12, 7, 9, 10, 18, 27],
    ),
    "Llama-3-8B": (
        (
            *(4906.789, 717.365, 29.760, 26.312, 26.437, 27.011, 26.917, 25.992),
            *(24.760, 25.161, 25.237, 25.180, 25.391, 26.566, 25.967, 26.324),
            *(26.598, 26.639, 26.390, 25.920, 26.618, 26.209, 25.778, 25.153),
            *(25.930, 25.298, 25.318, 26.737, 26.487, 28.707, 35.674, 81.626),
        ),
        [8, 23, 9, 11, 10, 25, 26, 12, 22, 19],
    ),
}


@pytest.fixture(scope="module")
def model() -> Any:
    from tests.orthorank.models import plain

    return plain("llama", seed=3, num_hidden_layers=7, initializer_range=0.15)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(0, 128, (5, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_orders(name: str) -> None:
    figures, order = PUBLISHED[name]
    assert len(figures) == 32
    scores = {layer: figures[layer] for layer in one_shot_candidates(32)}
    assert rank_layers(scores, 10) == order
    everything = rank_layers(dict(enumerate(figures)), 32)
    assert everything[-3:] == [31, 1, 0], "without the rule the edges are last here by themselves"


def test_the_plus_rule_keeps_the_edges_whatever_their_score() -> None:
    scores = {layer: float(layer) for layer in range(12)} | {10: -5.0, 11: -9.0}
    allowed = one_shot_candidates(12)
    assert allowed == [4, 5, 6, 7, 8, 9]
    assert rank_layers({layer: scores[layer] for layer in allowed}, 3) == [4, 5, 6]
    assert one_shot_candidates(12, 0, 0) == list(range(12))
    assert rank_layers({layer: scores[layer] for layer in one_shot_candidates(12, 0, 0)}, 3) == [11, 10, 0]


def test_ties_and_losses_that_are_not_finite() -> None:
    scores = {5: 1.0, 3: 1.0, 4: math.nan, 7: -math.inf, 6: 0.5, 8: math.inf}
    assert rank_layers(scores, 3) == [6, 3, 5]
    with pytest.raises(OrthoRankError, match="score of layer 4 is nan, and it would be chosen"):
        rank_layers(scores, 4)
    with pytest.raises(OrthoRankError, match="count is 7; it must be from 0 to the number of scored layers, 6"):
        rank_layers(scores, 7)
    with pytest.raises(OrthoRankError, match="no layer may be taken: of 6 layers, 4 at the beginning and 2"):
        one_shot_candidates(6)
    with pytest.raises(OrthoRankError, match="protect_first is -1"):
        one_shot_candidates(6, -1)


@pytest.mark.parametrize("keep_ratio", [0.0, 1 / 3])
def test_losses_are_those_of_the_model_with_that_layer_switched(model: Any, windows: Tensor, keep_ratio: float) -> None:
    evaluator = Evaluator(LayerStack(model), windows, keep_ratio=keep_ratio, batch_size=1)
    seen: list[tuple[int, float, int, int]] = []
    state = loss_scores(evaluator, [1, 4, 2], on_score=lambda *told: seen.append(told))
    assert list(state.finite) == [1, 2, 4]
    assert [told[0] for told in seen] == [1, 2, 4]
    assert [told[2:] for told in seen] == [(1, 3), (2, 3), (3, 3)]
    for layer, loss in state.finite.items():
        with apply(model, OrthoRankConfig(layers=[layer], keep_ratio=keep_ratio)):
            assert loss == pytest.approx(perplexity(model, windows).loss, rel=1e-5)


def test_scoring_goes_on_where_it_stopped(model: Any, windows: Tensor, tmp_path: Path) -> None:
    def evaluator() -> Evaluator:
        return Evaluator(LayerStack(model), windows, keep_ratio=0.0, batch_size=1)

    whole = loss_scores(evaluator(), range(1, 6))
    path = tmp_path / "state.json"

    def stop(layer: int, loss: float, done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(ScoringInterrupted, match="after 2 of 5") as stopped:
        loss_scores(evaluator(), range(1, 6), on_score=stop, save_to=path)
    loaded = ScoreState.load(path)
    assert loaded == stopped.value.state
    assert list(loaded.scores) == [1, 2]
    rest: list[int] = []
    state = loss_scores(evaluator(), range(1, 6), state=loaded, on_score=lambda layer, *_: rest.append(layer))
    assert state == whole
    assert rest == [3, 4, 5]
    with pytest.raises(OrthoRankError, match="state is of another search: its candidates is"):
        loss_scores(evaluator(), range(1, 5), state=loaded)
    other = Evaluator(LayerStack(model), windows.flip(0), keep_ratio=0.0)
    with pytest.raises(OrthoRankError, match="state is of another search: its fingerprint is"):
        loss_scores(other, range(1, 6), state=loaded)
    path.write_text("{}")
    with pytest.raises(OrthoRankError, match="not a saved one-shot search"):
        ScoreState.load(path)


def test_magnitude_is_the_sum_of_absolute_weights(model: Any) -> None:
    scores = magnitude_scores(LayerStack(model))
    for index, layer in enumerate(model.model.layers):
        state = layer.state_dict()
        assert len(state) == 9, "seven matrices and two norms"
        assert scores[index] == pytest.approx(sum(weight.abs().double().sum().item() for weight in state.values()))


def plain_taylor(model: Any, windows: Tensor) -> list[float]:
    """The definition, with all gradients of the model at once."""
    import copy

    model = copy.deepcopy(model)
    for ids in windows:
        loss = model(ids[None], labels=ids[None]).loss / len(windows)
        loss.backward()
    return [
        sum((weight * weight.grad).abs().sum().item() for weight in layer.parameters()) for layer in model.model.layers
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_taylor_is_that_of_plain_autograd(model: Any, windows: Tensor, batch_size: int) -> None:
    told: list[tuple[int, int]] = []
    scores = taylor_scores(LayerStack(model), windows, batch_size=batch_size, on_layer=lambda *done: told.append(done))
    assert list(scores) == list(range(7))
    assert list(scores.values()) == pytest.approx(plain_taylor(model, windows), rel=1e-4)
    assert told == [(done, 7) for done in range(1, 8)]


def test_taylor_sums_over_batches_before_the_absolute_value(model: Any, windows: Tensor) -> None:
    together = taylor_scores(LayerStack(model), windows)
    apart = [taylor_scores(LayerStack(model), ids[None]) for ids in windows]
    for layer, score in together.items():
        assert score < 0.95 * sum(scores[layer] for scores in apart) / len(windows), "gradients cancel"


def test_taylor_slices_the_logits(model: Any, windows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = taylor_scores(LayerStack(model), windows)
    monkeypatch.setattr("orthorank.stack.layers.LOGITS_AT_ONCE", 128 * 7)
    assert list(taylor_scores(LayerStack(model), windows).values()) == pytest.approx(list(whole.values()), rel=1e-4)


def test_taylor_leaves_the_model_untouched(windows: Tensor) -> None:
    """Also its training flags and which weights ask for gradients, and also when it is stopped in the middle."""
    from tests.orthorank.models import plain

    model = plain("llama", num_hidden_layers=3, attention_dropout=0.5).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.requires_grad_(False)
    given = torch.full_like(model.model.norm.weight, 7.0)
    model.model.norm.weight.grad = given

    def everything() -> list[Any]:
        return [
            [(name, weight.requires_grad, weight.grad is None) for name, weight in model.named_parameters()],
            [(name, module.training) for name, module in model.named_modules()],
            [(name, list(module.__dict__)) for name, module in model.named_modules()],
        ]

    before, weights = everything(), [weight.detach().clone() for weight in model.parameters()]
    scores = taylor_scores(LayerStack(model), windows)
    assert everything() == before
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True))
    assert model.model.norm.weight.grad is given
    assert taylor_scores(LayerStack(model), windows) == scores, "no dropout, though the model is in training mode"

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        taylor_scores(LayerStack(model), windows, on_layer=stop)
    assert everything() == before


def test_taylor_within_inference_mode(model: Any, windows: Tensor) -> None:
    with torch.inference_mode():
        inside = taylor_scores(LayerStack(model), windows)
    assert inside == taylor_scores(LayerStack(model), windows)


def test_experts_without_tokens_score_nothing(windows: Tensor) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=16,
        num_experts_per_tok=1,
        initializer_range=0.2,
    )
    model = MixtralForCausalLM(config).eval()
    few = windows[:1, :6]
    assert list(taylor_scores(LayerStack(model), few).values()) == pytest.approx(plain_taylor(model, few), rel=1e-4)


def test_weights_that_are_not_here_are_named(windows: Tensor) -> None:
    from tests.orthorank.models import plain

    model = plain("llama", num_hidden_layers=2)
    model.model.layers[1].to("meta")
    for score in (lambda: magnitude_scores(LayerStack(model)), lambda: taylor_scores(LayerStack(model), windows)):
        with pytest.raises(OrthoRankError, match=r"self_attn.q_proj.weight of layer 1 is offloaded"):
            score()
    model = plain("llama", num_hidden_layers=2)
    packed = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.model.layers[0].mlp.up_proj.weight = packed
    with pytest.raises(OrthoRankError, match=r"up_proj.weight of layer 0 is torch.int8"):
        magnitude_scores(LayerStack(model))


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 1)])
def test_taylor_says_what_is_wrong(model: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(OrthoRankError, match="input_ids has shape"):
        taylor_scores(LayerStack(model), torch.zeros(shape, dtype=torch.int64))
    with pytest.raises(OrthoRankError, match="batch_size is 0"):
        taylor_scores(LayerStack(model), torch.zeros(1, 4, dtype=torch.int64), batch_size=0)
