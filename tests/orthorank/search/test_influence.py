"""ShortGPT's block influence against its definition on a Hugging Face model's own states."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankError
from orthorank.search.influence import block_influence
from orthorank.search.one_shot import rank_layers
from orthorank.stack.layers import LayerStack


@pytest.fixture(scope="module")
def model() -> Any:
    from tests.orthorank.models import plain

    return plain("llama", seed=2, num_hidden_layers=5)


@pytest.fixture(scope="module")
def windows() -> Tensor:
    return torch.randint(1, 128, (5, 24), generator=torch.Generator().manual_seed(1))


def plain(model: Any, windows: Tensor) -> list[float]:
    """From hooks on the layers: the input and the layer's own output."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    values = []
    for before, after in seen:
        unit = [states / states.norm(dim=-1, keepdim=True) for states in (before, after)]
        values.append((1 - (unit[0] * unit[1]).sum(-1)).mean().item())
    return values


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_the_definition(model: Any, windows: Tensor, batch_size: int) -> None:
    told: list[tuple[int, int]] = []
    scores = block_influence(
        LayerStack(model), windows, batch_size=batch_size, on_batch=lambda *done: told.append(done)
    )
    assert list(scores) == list(range(5))
    assert list(scores.values()) == pytest.approx(plain(model, windows), abs=1e-6)
    batches = -(-5 // batch_size)
    assert told == [(done, batches) for done in range(1, batches + 1)]


def test_the_last_layer_s_output_is_its_own(model: Any, windows: Tensor) -> None:
    """A Hugging Face model's last hidden state is behind the final norm; that would be another figure."""
    with torch.no_grad():
        states = model(windows, output_hidden_states=True, use_cache=False).hidden_states
    behind_the_norm = (1 - torch.cosine_similarity(states[-2], states[-1], dim=-1)).mean().item()
    import copy

    bent = copy.deepcopy(model)
    with torch.no_grad():
        bent.model.norm.weight[:32].mul_(-1)
    assert block_influence(LayerStack(bent), windows) == block_influence(LayerStack(model), windows)
    with torch.no_grad():
        states = bent(windows, output_hidden_states=True, use_cache=False).hidden_states
    assert abs((1 - torch.cosine_similarity(states[-2], states[-1], dim=-1)).mean().item() - behind_the_norm) > 0.1


def test_a_layer_that_does_nothing_has_no_influence(model: Any, windows: Tensor) -> None:
    import copy

    idle = copy.deepcopy(model)
    with torch.no_grad():
        idle.model.layers[3].self_attn.o_proj.weight.zero_()
        idle.model.layers[3].mlp.down_proj.weight.zero_()
    scores = block_influence(LayerStack(idle), windows)
    assert scores[3] == pytest.approx(0.0, abs=1e-12)
    assert rank_layers(scores, 1) == [3]


def test_it_says_what_is_wrong(model: Any) -> None:
    with pytest.raises(OrthoRankError, match=r"input_ids has shape \[24\]"):
        block_influence(LayerStack(model), torch.zeros(24, dtype=torch.int64))
    with pytest.raises(OrthoRankError, match="batch_size is 0"):
        block_influence(LayerStack(model), torch.zeros(1, 24, dtype=torch.int64), batch_size=0)
