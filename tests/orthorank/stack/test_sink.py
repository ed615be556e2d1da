"""Sink detection: the rule on made-up ratios, the measurement on a tiny model, the verdict on a real one."""

from typing import Any

import pytest
import torch

from orthorank.common.errors import OrthoRankError
from orthorank.stack.layers import LayerStack
from orthorank.stack.sink import SinkReport, candidate_layers, detect_sink, find_sink_layer
from tests.orthorank.models import plain

# SmolLM2-135M-Instruct, rounded: a bump that rises to 9 in layers 1 and 2, then the sink after layer 11.
SMOLLM2 = [0.98, 1.26, 3.1, 9.0, 8.1, 7.6, 7.1, 6.6, 6.1, 4.5, 1.1, 1.0, 175, 168, 155, 148, 136, 125, 120, 113, 102,
           95, 80, 70, 61, 49, 44, 41, 34, 12, 6]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> Any:
    """Of 8 layers, as small as they are initialised by default: nothing in it grows of itself."""
    settings = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "head_dim": 8}
    return plain("llama", **settings, initializer_range=0.02, pad_token_id=None)


def with_sink(model: Any, layer: int) -> None:
    """Make position 0, and it alone, large in one channel after ``layer``."""
    inner = model.model.layers[layer].forward

    def forward(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        output = inner(hidden_states, *args, **kwargs).clone()
        output[:, 0, 3] += 1000.0
        return output

    model.model.layers[layer].forward = forward


def test_the_rule_on_the_published_profile() -> None:
    layer, reason = find_sink_layer(SMOLLM2)
    assert layer == 11
    assert "layer 11 of 30" in reason
    assert "from 1 to 175" in reason
    assert "cosine" not in reason, "none was given"
    cosines = [0.5] * 12 + [0.9, *[0.99] * 6] + [0.1] * 10
    reason = find_sink_layer(SMOLLM2, cosines)[1]
    assert "(cosine from layer to layer 0.900 or more in the next 7 layers)" in reason, "not of all later ones"


@pytest.mark.parametrize(
    ("ratios", "words"),
    [
        ([1.0, 1.5, 2.0, 3.0, 4.0, 4.5, 5.0, 5.5, 6.0], "largest jump of the norm ratio is 1.5x"),
        ([1.0, 1.0, 8.0, 7.0, 7.0, 6.0, 5.0, 4.0, 3.0], "for 0 layers"),  # jumps, but never 10
        ([1.0, 1.0, 50.0, 9.0, 8.0, 7.0, 6.0, 5.0, 5.0], "for 1 layers"),  # 10, but not for L/4 = 2 layers
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 90.0], "for 1 layers"),  # too late to stay
        ([1.0, float("nan"), 1.0, 1.0, 1.0], "no sink"),
    ],
)
def test_no_sink_says_why(ratios: list[float], words: str) -> None:
    layer, reason = find_sink_layer(ratios)
    assert layer is None
    assert words in reason
    assert reason.startswith("no sink")


def test_a_sink_from_the_first_layer_on() -> None:
    """The embedding itself is not a layer: the earliest possible sink layer is 0."""
    assert find_sink_layer([1.0, 80.0, 80.0, 80.0, 80.0])[0] == 0
    assert find_sink_layer([1.0, 4.99, 80.0, 80.0, 80.0])[0] == 1


def test_measured_figures_are_those_of_the_model(model: Any) -> None:
    ids = torch.randint(0, 96, (400,), generator=torch.Generator().manual_seed(2))
    report = detect_sink(model, input_ids=ids, tokens=9, first_tokens=17)
    assert (report.num_layers, report.first_tokens, report.tokens) == (8, 17, 9)
    assert len(report.ratios) == len(report.sink_norms) == len(report.other_norms) == 9
    assert (len(report.cos_others), len(report.cos_self)) == (8, 7)
    spread = zip(report.ratios_low, report.ratios, report.ratios_high, strict=True)
    assert all(low <= middle <= high for low, middle, high in spread)

    from orthorank.stack import sink

    passages = sink._passages(ids, 17, 9)
    assert len(set(passages[:, 0].tolist())) == 17
    with torch.no_grad():
        states = model(passages, output_hidden_states=True).hidden_states
    for layer in (0, 3, 7):  # inputs of the layers; the last hidden_states are after the final norm
        norms = states[layer].norm(dim=-1)
        ratio = norms[:, 0] / norms[:, 1:].quantile(0.5, dim=1)
        assert report.ratios[layer] == pytest.approx(ratio.quantile(0.5).item(), rel=1e-5)
        assert report.ratios_high[layer] == pytest.approx(ratio.max().item(), rel=1e-5)
    normed = [model.model.layers[i].input_layernorm(states[i]) for i in (3, 4)]
    between = torch.cosine_similarity(normed[0][:, 0], normed[1][:, 0], dim=-1).quantile(0.5)
    assert report.cos_self[3] == pytest.approx(between.item(), rel=1e-5)
    with_others = torch.cosine_similarity(normed[0][:, :1], normed[0][:, 1:], dim=-1).mean()
    assert report.cos_others[3] == pytest.approx(with_others.item(), rel=1e-4)


def test_a_made_sink_is_found(model: Any) -> None:
    import copy

    assert detect_sink(model, tokens=8).sink_layer is None
    sunk = copy.deepcopy(model)
    with_sink(sunk, 2)
    report = detect_sink(sunk, tokens=8)
    assert report.sink_layer == 2
    assert report.applies
    assert candidate_layers(report) == [3, 4, 5]
    assert candidate_layers(report, protect_last=1) == [3, 4, 5, 6]
    assert report.to_dict()["applies"] is True
    assert str(report) == report.reason
    late = copy.deepcopy(model)
    with_sink(late, 5)  # layers 6 and 7 are the protected ones
    report = detect_sink(late, tokens=8)
    assert report.sink_layer == 5
    assert not report.applies


def test_without_a_sink_the_candidates_are_an_error(model: Any) -> None:
    report: SinkReport = detect_sink(model, tokens=8)
    assert not report.applies
    with pytest.raises(OrthoRankError, match=r"no sink.*yourself"):
        candidate_layers(report)


def test_detection_says_what_is_wrong(model: Any) -> None:
    with pytest.raises(OrthoRankError, match="first_tokens is 4"):
        detect_sink(model, first_tokens=4)
    with pytest.raises(OrthoRankError, match="tokens is 1"):
        detect_sink(model, tokens=1)
    with pytest.raises(OrthoRankError, match=r"input_ids has shape \[2, 50\]"):
        detect_sink(model, input_ids=torch.zeros(2, 50, dtype=torch.long))
    with pytest.raises(OrthoRankError, match="3 passages of 64 tokens that begin differently"):
        detect_sink(model, input_ids=torch.arange(500) % 3)
    with pytest.raises(OrthoRankError, match="0 passages"):
        detect_sink(model, input_ids=torch.arange(20))


def test_the_model_is_only_read(model: Any) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    detect_sink(model, tokens=8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in layer.__dict__ for layer in model.model.layers)
    LayerStack(model)


@pytest.mark.parametrize("how", ["prose", "random ids"])
def test_smollm2(smollm2: tuple[Any, Any], how: str) -> None:
    """The sink forms after layer 11 of 30, whatever the text; layers 12 to 27 may select tokens."""
    model, tokenizer = smollm2
    report = detect_sink(model, tokenizer if how == "prose" else None)
    assert report.sink_layer == 11
    assert candidate_layers(report) == list(range(12, 28))
    assert 0.7 < report.ratios[11] < 1.4
    assert 150 < report.ratios[12] < 200
    assert max(report.ratios[:12]) < 11, "the false bump at layer 3"
    assert min(report.cos_self[12:28]) > 0.95, "Observation 2: the sink's state stays where it is"
    after = report.cos_others[12:]
    assert sum(after[-6:]) / 6 > sum(after[:6]) / 6 + 0.2, "Observation 1: the others turn towards it"
