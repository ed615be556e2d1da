"""Applying and undoing a plan: what changes, what does not, and what survives it."""

import copy
import pickle
from typing import Any

import pytest
import torch

import orthorank
from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_layer import ids_of


def instance_state(model: Any) -> dict[str, dict[str, Any]]:
    """The identity of everything that an instance holds, module by module."""
    return {name: {key: id(value) for key, value in m.__dict__.items()} for name, m in model.named_modules()}


def test_remove_restores_the_identical_objects(tiny_model: Any, family: str, plan: OrthoRankConfig) -> None:
    model = tiny_model(family)
    ids = ids_of(1, 12)
    with torch.no_grad():
        dense = model(ids).logits
        before = instance_state(model)
        handle = apply(model, plan)
        assert instance_state(model) != before
        assert not torch.equal(model(ids).logits, dense)
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
        handle.remove()
        assert instance_state(model) == before
        assert torch.equal(model(ids).logits, dense)


def test_state_dict_is_untouched(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    before = list(model.state_dict())
    with apply(model, plan):
        assert list(model.state_dict()) == before


def test_only_this_instance_changes(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model, other = tiny_model("llama"), tiny_model("llama")
    ids = ids_of(1, 12)
    with torch.no_grad(), apply(model, plan):
        assert not torch.equal(model(ids).logits, other(ids).logits)
    assert orthorank.handle_of(other) is None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_plan(tiny_model: Any, family: str, clone: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model(family)
    ids = ids_of(1, 12)
    with torch.no_grad():
        dense = model(ids).logits
        handle = apply(model, plan)
        selected = model(ids).logits
        other = clone(model)
        own = orthorank.handle_of(other)
        assert own is not None
        assert own is not handle
        handle.remove()
        assert torch.equal(other(ids).logits, selected)
        assert torch.equal(other.generate(ids, max_new_tokens=2, pad_token_id=0)[:, :12], ids)
        own.remove()
        assert torch.equal(other(ids).logits, dense)


def test_applying_twice(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    handle = apply(model, plan)
    with pytest.raises(OrthoRankError, match="applied to this model already"):
        apply(model, plan)
    handle.remove()
    apply(model, plan).remove()


def test_under_an_accelerate_hook(tiny_model: Any, plan: OrthoRankConfig) -> None:
    """accelerate moves inputs and weights around a module's own forward; the plan takes that forward's place."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    with torch.no_grad():
        with apply(model, plan):
            expected = model(ids).logits
        seen = []

        class Recorder(hooks.ModelHook):
            def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
                seen.append(type(module).__name__)
                return args, kwargs

        hooks.add_hook_to_module(model.model.layers[1], Recorder())
        with apply(model, plan):
            assert torch.equal(model(ids).logits, expected)
        assert seen == ["LlamaDecoderLayer"]


def test_the_decoder_alone_can_be_patched(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    with torch.no_grad():
        with apply(model, plan):
            expected = model.model(ids).last_hidden_state
        with apply(model.model, plan) as handle, handle.prefilling(keep_last=0):  # alone, it would force the last token
            assert torch.equal(model.model(ids).last_hidden_state, expected)
            assert handle.stats[1].calls == 1


def test_an_error_in_a_call_leaves_the_model_usable(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    with apply(model, plan), torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(IndexError):
            model(torch.full((1, 4), 10**6))
        with pytest.raises(ValueError, match="specify exactly one"):
            model.model()
        assert torch.equal(model(ids).logits, expected)


def test_weights_that_accelerate_offloads(tiny_model: Any, plan: OrthoRankConfig) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny_model("llama")
    ids = ids_of(2, 12)
    with torch.no_grad():
        with apply(model, plan):
            expected = model(ids).logits
            generated = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert model.model.layers[1].input_layernorm.weight.device.type == "meta"
        with apply(model, plan):
            assert torch.equal(model(ids).logits, expected)
            assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0), generated)
        assert model.model.layers[1].input_layernorm.weight.device.type == "meta"


def test_removing_after_a_hook_was_taken_off(tiny_model: Any, plan: OrthoRankConfig) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    with torch.no_grad():
        dense = model(ids).logits
        hooks.add_hook_to_module(model.model.layers[1], hooks.ModelHook())
        handle = apply(model, plan)
        hooks.remove_hook_from_module(model.model.layers[1])
        assert not torch.equal(model(ids).logits, dense)
        handle.remove()
        assert torch.equal(model(ids).logits, dense)


def test_the_plan_is_copied_and_modules_are_read_when_called(tiny_model: Any) -> None:
    model = tiny_model("llama")
    ids = ids_of(1, 12)
    plan = OrthoRankConfig(layers=[1, 2])
    with torch.no_grad(), apply(model, plan) as handle:
        before = model(ids).logits
        plan.keep_ratio = 2.0
        assert torch.equal(model(ids).logits, before)
        assert handle.config.keep_ratio == 1 / 3
        model.model.layers[1].mlp = torch.nn.Identity()
        assert not torch.equal(model(ids).logits, before)


def test_applying_to_the_decoder_of_a_patched_model(tiny_model: Any, plan: OrthoRankConfig) -> None:
    model = tiny_model("llama")
    for first, second in ((model, model.model), (model.model, model)):
        with apply(first, plan), pytest.raises(OrthoRankError, match="applied to this model already"):
            apply(second, plan)
    assert orthorank.handle_of(model) is None


def test_autocast(tiny_model: Any) -> None:
    """The plan under autocast is the plan in the lower precision: near its float32 result, and of the dtype it had."""
    model = tiny_model("llama")
    ids = ids_of(2, 16)
    for criterion in ("orthogonal", "inverse"):
        plan = OrthoRankConfig(layers=[1, 2], keep_ratio=1 - 1e-9, criterion=criterion)  # all: no near ties to flip
        with torch.no_grad(), apply(model, plan):
            exact = model(ids).logits
            with torch.autocast("cpu", torch.bfloat16):
                low = model(ids).logits
        assert (low.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_gradient_checkpointing_recomputes_selected_layers(tiny_model: Any, plan: OrthoRankConfig) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    ids = ids_of(1, 12)
    if "__call__" in vars(GradientCheckpointingLayer):  # older: the whole call of a layer is run again, on its own
        model = tiny_model("llama").train()
        model.gradient_checkpointing_enable()
        with apply(model, plan), pytest.raises(OrthoRankError, match="called outside its model's forward"):
            model(ids, labels=ids, use_cache=False).loss.backward()
        return
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = tiny_model("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        calls: list[int] = []
        model.model.layers[1].mlp.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        with apply(model, plan):
            model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.model.layers[1].mlp.down_proj.weight.grad)
        runs.append(len(calls))
    assert runs == [1, 2]
    torch.testing.assert_close(*gradients)


def test_a_watcher_sees_what_each_layer_selects(tiny_model: Any) -> None:
    """Counted in the call's own tokens, in position order, and not where every token is dense."""
    model = tiny_model("llama")
    seen: list[tuple[int, list[list[int]]]] = []
    ids = torch.arange(3, 15)[None].expand(2, -1).clone()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    with orthorank.apply(model, orthorank.OrthoRankConfig(layers=[1, 3], keep_ratio=0.5)) as handle:
        with handle.watching(lambda layer, positions, call: seen.append((layer, positions.tolist()))):
            model(ids, attention_mask=mask)
            with handle.decoding():
                model(ids, attention_mask=mask)
        model(ids, attention_mask=mask)
    assert [layer for layer, _ in seen] == [1, 3]
    for _, (whole, padded) in seen:
        assert len(whole) == 6
        assert whole == sorted(whole)
        assert 0 not in whole, "the sink"
        chosen = [at for at in padded if at >= 0]
        assert len(chosen) == 3
        assert min(chosen) > 6, "the sink of the second row is its first token, after the padding"
