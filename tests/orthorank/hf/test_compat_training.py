"""Training with a plan applied: gradients take the reference path; kernels asked for by name refuse them."""

from functools import partial
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply
from orthorank_kernels import rms_norm_select
from orthorank_kernels.dispatch import BackendError
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny
from tests.orthorank.statement import assert_close, ranks, selected_mask, updating

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)


def stated_loss(model: Any, ids: torch.Tensor, k: int) -> torch.Tensor:
    """The loss of one row by the statement of the method: the dense layer's output where a token is selected."""

    def choose(layer: int, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return selected_mask(ranks("orthogonal", h[0], x[0]), k)[None]

    with updating(model, PLAN.layers, choose):
        return model(ids, labels=ids, use_cache=False).loss


def test_a_training_step_is_that_of_the_statement() -> None:
    """Same loss, same gradients; the step lowers the loss, and changes every weight of the selected layers."""
    model, ids = tiny("llama-3").train(), ids_of(1, 21)
    stated = stated_loss(model, ids, k=7)
    stated.backward()
    expected = {name: weight.grad for name, weight in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    with apply(model, PLAN):
        loss = model(ids, labels=ids).loss
        assert_close(loss.detach(), stated.detach())
        loss.backward()
        for name, weight in model.named_parameters():
            assert_close(weight.grad, expected[name])
        optimiser.step()
        with torch.no_grad():
            assert model(ids, labels=ids).loss < loss
    for name, weight in model.named_parameters():
        if name.startswith(("model.layers.1.", "model.layers.2.")):
            assert not torch.equal(weight, before[name]), f"{name} did not learn"


def test_rows_of_a_padded_batch_learn_as_they_do_alone() -> None:
    model = tiny("llama-3").train()
    ids, mask = ids_of(2, 18), torch.ones(2, 18, dtype=torch.long)
    mask[0, :6] = 0
    weight = model.model.layers[1].mlp.down_proj.weight
    gradients = []
    with apply(model, PLAN):
        for rows in ([(ids, mask)], [(ids[:1, 6:], None), (ids[1:], None)]):
            for tokens, padding in rows:
                logits = model(tokens, attention_mask=padding, use_cache=False).logits
                (logits if padding is None else logits[padding.bool()]).square().sum().backward()
            gradients.append(weight.grad)
            weight.grad = None
    assert_close(gradients[0], gradients[1])


def with_backend(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Every op that a selected layer runs is asked to run on ``backend``."""
    from orthorank.families import parts
    from orthorank.hf import criteria, layer

    named = {
        criteria: ("rms_norm_select",),
        layer: ("gather_rows", "scatter_add_rows_", "sparse_query_attention"),
        parts: ("apply_rotary_at", "gather_add_rms_norm", "silu_and_mul"),
    }
    for module, names in named.items():
        for name in names:
            monkeypatch.setattr(module, name, partial(getattr(module, name), backend=backend))


def test_an_explicit_triton_backend_refuses_what_requires_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the op and in the model, in one sentence; without gradients the kernels give the reference's logits."""
    h, weight = torch.randn(1, 8, 64), torch.ones(64)
    words = r"got an input that requires grad, and the kernels have no backward; call under torch\.no_grad\(\)"
    with pytest.raises(BackendError, match=words):
        rms_norm_select(h.requires_grad_(), weight, 1e-6, k=3, backend="triton")
    model, ids = tiny("llama-3", num_hidden_layers=2), ids_of(1, 9)
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=1 / 3)):
        with torch.no_grad():
            expected = model(ids).logits
        with_backend(monkeypatch, "triton")
        with pytest.raises(BackendError, match=words):
            model(ids)
        with torch.no_grad():
            assert_close(model(ids).logits, expected)
