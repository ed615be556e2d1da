"""Taylor scores and block influence of every family, against plain autograd and against hooks on the model."""

from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank.search import block_influence, magnitude_scores, taylor_scores
from orthorank.stack.layers import LayerStack
from tests.orthorank.models import MODELS, tiny

WINDOWS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(1))  # longer than the sliding windows


@pytest.fixture(params=sorted(MODELS))
def model(request: pytest.FixtureRequest) -> Any:
    return tiny(request.param)


def plain(model: Any) -> tuple[list[float], list[float]]:
    """Taylor scores and block influences from one forward of the whole model, with all its gradients at once."""
    seen: list[tuple[Tensor, Tensor]] = []

    def note(module: Any, inputs: Any, kwargs: Any, output: Any) -> None:
        before = inputs[0] if inputs else kwargs["hidden_states"]
        seen.append((before.detach(), (output[0] if isinstance(output, tuple) else output).detach()))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in model.model.layers]
    logits = model(WINDOWS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), WINDOWS[:, 1:].flatten()).backward()
    taylor = [
        sum((weight * weight.grad).abs().sum().item() for weight in layer.parameters() if weight.grad is not None)
        for layer in model.model.layers
    ]
    turned = [(1 - torch.cosine_similarity(*pair, dim=-1)).mean().item() for pair in seen]
    model.zero_grad(set_to_none=True)
    return taylor, turned


def test_scores_are_those_of_the_model_itself(model: Any) -> None:
    taylor, turned = plain(model)
    stack = LayerStack(model)
    assert list(taylor_scores(stack, WINDOWS).values()) == pytest.approx(taylor, rel=2e-4)
    assert list(block_influence(stack, WINDOWS).values()) == pytest.approx(turned, abs=1e-5)
    assert all(weight.grad is None for weight in model.parameters())
    size = [sum(weight.abs().sum().item() for weight in layer.parameters()) for layer in model.model.layers]
    assert list(magnitude_scores(stack).values()) == pytest.approx(size, rel=1e-5)
