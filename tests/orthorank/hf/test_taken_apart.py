"""What is done to a selected layer's parts is honoured, or refused by name: never left out without a word."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.stack.layers import LayerStack
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import MODELS, tiny
from tests.orthorank.statement import assert_close, logits

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
IDS = ids_of(1, 24)


def selected(model: Any, plan: OrthoRankConfig = PLAN) -> Tensor:
    with apply(model, plan), torch.no_grad():
        return model(IDS).logits


def zeroed(module: Any, args: Any, output: Any) -> Any:
    return (output[0] * 0, *output[1:])


def eight_bits(module: Any, args: Any, kwargs: Any) -> Any:
    """As key/value schemes do that work on what attention reads."""
    scale = kwargs["hidden_states"].abs().max() / 127
    return args, kwargs | {"hidden_states": (kwargs["hidden_states"] / scale).round() * scale}


def forward_of_the_instance(attention: Any) -> None:
    original = type(attention).forward
    mine = lambda *args, **kwargs: zeroed(attention, args, original(attention, *args, **kwargs))  # noqa: E731
    attention.forward = functools.wraps(original)(mine)


def of_a_subclass(attention: Any) -> None:
    class Mine(type(attention)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return zeroed(self, args, super().forward(*args, **kwargs))

    attention.__class__ = Mine


def accelerated(attention: Any) -> None:
    hooks = pytest.importorskip("accelerate.hooks")

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return zeroed(module, (), output)

    hooks.add_hook_to_module(attention, Doubles())


def hook_in_a_new_dictionary(attention: Any) -> None:
    """As code does that clears a module's hooks by replacing them."""
    attention._forward_hooks = OrderedDict()
    attention.register_forward_hook(zeroed)


def call_of_a_subclass(attention: Any) -> None:
    class Mine(type(attention)):  # type: ignore[misc]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return zeroed(self, args, super().__call__(*args, **kwargs))

    attention.__class__ = Mine


def call_of_the_instance(name: str, attention: Any) -> None:
    original = attention._call_impl
    setattr(attention, name, lambda *args, **kwargs: zeroed(attention, args, original(*args, **kwargs)))


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward hook": (lambda a: a.register_forward_hook(zeroed), "the forward hook zeroed of tests"),
    "forward pre-hook": (
        lambda a: a.register_forward_pre_hook(eight_bits, with_kwargs=True),
        "the forward pre-hook eight_bits of tests",
    ),
    "backward hook": (lambda a: a.register_full_backward_hook(lambda *_: None), "the backward hook"),
    "instance": (forward_of_the_instance, "a forward of its own, .*test_taken_apart"),
    "subclass": (of_a_subclass, "the forward that its class Mine was given, of_a_subclass"),
    "new dictionary": (hook_in_a_new_dictionary, "the forward hook zeroed of tests"),
    "call of a subclass": (call_of_a_subclass, "the __call__ of its class Mine"),
    "_call_impl": (functools.partial(call_of_the_instance, "_call_impl"), "a _call_impl of its own, call_of_the"),
    "_compiled_call_impl": (
        functools.partial(call_of_the_instance, "_compiled_call_impl"),
        "a _compiled_call_impl of its own, call_of_the",
    ),
    "accelerate": (accelerated, "a forward of its own, Doubles, a hook of accelerate"),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_changes_of_attention_are_named(change: str) -> None:
    """At `apply`, and at the next call where the change came later; `generate()` says it before it answers."""
    make, said = CHANGES[change]
    model = tiny("llama-3")
    make(model.model.layers[1].self_attn)
    with pytest.raises(OrthoRankError, match=f"layer 1 selects tokens.*its self_attn has {said}") as raised:
        apply(model, PLAN)
    assert "leave layer 1 out of the plan's layers" in str(raised.value)
    assert "_orthorank_handle" not in vars(model)

    model = tiny("llama-3")
    with apply(model, PLAN) as handle, torch.no_grad():
        before = model(IDS).logits
        attention = model.model.layers[2].self_attn
        kept = type(attention)
        make(attention)
        for call in (model, functools.partial(model.generate, max_new_tokens=2, pad_token_id=0)):
            with pytest.raises(OrthoRankError, match=f"layer 2 selects tokens.*{said}"):
                call(IDS)
        with handle.decoding():  # nothing is taken apart: all is called
            dense = model(IDS).logits
        handle.remove()
        assert torch.equal(model(IDS).logits, dense)
        attention.__class__ = kept
        assert not torch.equal(before, dense)


def test_a_change_that_is_taken_back(family: str, tiny_model: Any) -> None:
    model = tiny_model(family)
    with apply(model, PLAN), torch.no_grad():
        before = model(IDS).logits
        hook = model.model.layers[1].self_attn.register_forward_hook(zeroed)
        with pytest.raises(OrthoRankError, match="the forward hook zeroed"):
            model(IDS)
        hook.remove()
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_layers_that_are_not_taken_apart_take_hooks(ratio: float) -> None:
    model = tiny("llama-3")
    calls: list[int] = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=ratio)), torch.no_grad():
        model(IDS)
    assert len(calls) == ratio


@pytest.mark.parametrize("name", ["LlamaAttention", "LlamaDecoderLayer"])
@pytest.mark.parametrize("hidden", [False, True], ids=["plain", "behind functools.wraps"])
def test_a_forward_that_a_class_was_given(monkeypatch: pytest.MonkeyPatch, name: str, hidden: bool) -> None:
    from transformers.models.llama import modeling_llama

    kind = getattr(modeling_llama, name)
    original = kind.forward

    def mine(self: Any, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **kwargs)

    model = tiny("llama-3")
    with apply(model, PLAN), torch.no_grad():
        model(IDS)
        monkeypatch.setattr(kind, "forward", functools.wraps(original)(mine) if hidden else mine)
        with pytest.raises(OrthoRankError, match=f"the forward that its class {name} was given"):
            model(IDS)
    with pytest.raises(OrthoRankError, match=f"the forward that its class {name} was given"):
        apply(model, PLAN)


def test_a_forward_of_the_layer_before_apply() -> None:
    model = tiny("llama-3")
    layer = model.model.layers[1]
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)
    with pytest.raises(OrthoRankError, match=r"the layer has a forward of its own, .* set before the plan was applied"):
        apply(model, PLAN)
    layer.forward = type(layer).forward.__get__(layer)  # its class's: nothing is changed
    assert torch.equal(selected(model), selected(tiny("llama-3")))


def test_functions_that_a_modelling_file_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama import modeling_llama

    def mine(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    for name, implementation in (("apply_rotary_pos_emb", "sdpa"), ("eager_attention_forward", "eager")):
        with monkeypatch.context() as patch:
            model = tiny("llama-3", attention=implementation)
            with apply(model, PLAN), torch.no_grad():
                patch.setattr(modeling_llama, name, mine)
                with pytest.raises(OrthoRankError, match=f"the {name} that its modelling file was given"):
                    model(IDS)


def test_a_registered_attention_function() -> None:
    from transformers import AttentionInterface

    def mine(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("mine", mine)
    model = tiny("llama-3")
    with apply(model, PLAN), torch.no_grad():
        before = model(IDS).logits
        model.set_attn_implementation("mine")
        with pytest.raises(OrthoRankError, match=r"the attention function 'mine'.*set_attn_implementation\(\"sdpa\"\)"):
            model(IDS)
        model.set_attn_implementation("eager")
        assert_close(model(IDS).logits, before, relative=1e-4)


def test_an_attention_function_that_is_registered_anew() -> None:
    """The name stays, the function does not: with a plan applied and at `apply`."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def mine(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError

    model, original = tiny("llama-3"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    with apply(model, PLAN), torch.no_grad():
        before = model(IDS).logits
        try:
            AttentionInterface.register("sdpa", mine)
            with pytest.raises(OrthoRankError, match=r"layer 1 selects.*the attention function 'sdpa', test_an_att"):
                model(IDS)
            with pytest.raises(OrthoRankError, match="the attention function 'sdpa', test_an_att"):
                apply(tiny("llama-3"), PLAN)
        finally:
            AttentionInterface.register("sdpa", original)
        assert torch.equal(model(IDS).logits, before)


@pytest.mark.parametrize("part", ["layer", "attention", "wrapper"])
def test_other_classes_under_a_known_model_type(part: str) -> None:
    """As remote code has them: what they compute is not known, however alike their parts are called."""
    model, other = tiny("llama-3"), tiny("mistral", head_dim=16, sliding_window=None)
    if part == "layer":
        model.model.layers[1] = other.model.layers[1]
    elif part == "attention":
        model.model.layers[1].self_attn = other.model.layers[1].self_attn
    else:
        peft = pytest.importorskip("peft")
        settings = peft.AdaptionPromptConfig(adapter_layers=3, adapter_len=4, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, settings)
    for ratio in (0.0, 1 / 3):
        with pytest.raises(OrthoRankError, match=r"layer 1 has a .* and Llama models have classes of"):
            apply(model, OrthoRankConfig(layers=[1], keep_ratio=ratio))


def doubled(norm: Any) -> None:
    norm.register_forward_hook(lambda module, args, output: output * 2)


def shifted(norm: Any) -> None:
    norm.register_forward_pre_hook(lambda module, args: (args[0] + 0.5,))


def own_forward(norm: Any) -> None:
    norm.forward = lambda x: type(norm).forward(norm, x) * 0.5 + 0.1 * x


def pruned(norm: Any) -> None:
    """Its weight is computed when it is called: what was read before is stale."""
    prune.random_unstructured(norm, "weight", amount=0.5)
    norm.weight_orig.data.mul_(3)


class Squared(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight**2


def parametrised(norm: Any) -> None:
    parametrize.register_parametrization(norm, "weight", Squared())


NORMS: dict[str, Callable[[Any], None]] = {f.__name__: f for f in (doubled, shifted, own_forward, pruned, parametrised)}
QUICK = ("llama-3", "gemma-2", "olmo-2", "stablelm-parallel", "cohere")


@torch.no_grad()
@pytest.mark.parametrize("change", list(NORMS))
@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in sorted(MODELS)]
)
def test_norms_that_are_more_than_their_weights_are_called(name: str, change: str) -> None:
    """Every norm of a selected layer, in every family: the dense layer's rows, for the criteria that read the norm."""
    torch.manual_seed(0)
    names = [key for key, _ in tiny(name).model.layers[1].named_children() if "norm" in key]
    for norm in names:
        model = tiny(name)
        plain = selected(model)
        NORMS[change](getattr(model.model.layers[1], norm))
        for criterion in ("orthogonal", "inverse"):
            plan = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3, criterion=criterion)
            stated = logits(model, IDS, plan.layers, k=8, criterion=criterion)
            assert_close(selected(model, plan), stated, relative=2e-5)
        assert not torch.allclose(selected(model), plain), "the change changes nothing, and this tests nothing"


@torch.no_grad()
def test_a_norm_whose_class_was_given_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Liger-Kernel's patch of a class does: the norm is called."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    model = tiny("llama-3")
    original = LlamaRMSNorm.forward
    monkeypatch.setattr(LlamaRMSNorm, "forward", functools.wraps(original)(lambda self, x: original(self, x) * 1.5))
    assert_close(selected(model), logits(model, IDS, PLAN.layers, k=8))


@torch.no_grad()
def test_an_mlp_whose_class_was_given_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    model, original = tiny("llama-3"), LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", functools.wraps(original)(lambda self, x: original(self, x) * 1.5))
    assert_close(selected(model), logits(model, IDS, PLAN.layers, k=8))


@torch.no_grad()
def test_norms_in_float32_under_autocast() -> None:
    """Dense models run like that; so does the plan."""
    model = tiny("llama-3").bfloat16()
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.float()
    with torch.autocast("cpu", torch.bfloat16):
        dense = model(IDS).logits
        assert torch.isfinite(selected(model)).all()
        nearly_all = selected(model, OrthoRankConfig(layers=[1, 2], keep_ratio=1 - 1e-9))
    assert_close(nearly_all.float(), dense.float(), relative=0.1)


@torch.no_grad()
def test_layernorms_adapted_by_peft() -> None:
    peft = pytest.importorskip("peft")
    model = tiny("llama-3")
    wrapped = peft.get_peft_model(model, peft.LNTuningConfig(task_type="CAUSAL_LM")).eval()
    for name, weight in wrapped.named_parameters():
        if "ln_tuning_layers" in name:
            weight.mul_(1.5)
    adapted = selected(wrapped)
    assert_close(adapted, logits(wrapped.get_base_model(), IDS, PLAN.layers, k=8))
    assert not torch.allclose(adapted, selected(tiny("llama-3")))


@torch.no_grad()
def test_the_stack_of_a_search() -> None:
    """`orthorank search` runs layers without a plan being applied: the same rule, when a layer selects."""
    model = tiny("llama-3")
    doubled(model.model.layers[1].input_layernorm)
    stack = LayerStack(model)
    inputs = stack.embed(IDS)
    h = stack.run(0, inputs.hidden_states, inputs)
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=1 / 3)):
        expected = model.model(IDS, output_hidden_states=True, use_cache=False).hidden_states[2]
    assert_close(stack.run(1, h, inputs, keep_ratio=1 / 3), expected)
    model.model.layers[1].self_attn.register_forward_hook(zeroed)
    with pytest.raises(OrthoRankError, match=r"layer 1 selects tokens.*the forward hook zeroed"):
        stack.run(1, h, inputs, keep_ratio=1 / 3)
    stack.run(1, h, inputs)


@torch.no_grad()
@pytest.mark.parametrize("way", ["hook", "pre-hook"])
def test_the_stack_of_a_search_calls_the_layer(way: str) -> None:
    """What hangs on the layer itself runs where the layer selects, as in the patched and in the dense model."""
    model = tiny("llama-3")
    layer = model.model.layers[1]
    stack = LayerStack(model)
    inputs = stack.embed(IDS)
    plain = stack.run(1, inputs.hidden_states, inputs, keep_ratio=1 / 3)
    if way == "pre-hook":
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    else:
        layer.register_forward_hook(lambda module, args, output: output * 2)
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=1 / 3)):
        states: list[Tensor] = []
        taken = layer.register_forward_hook(lambda module, args, output: states.append(output))
        entry = layer.register_forward_pre_hook(lambda module, args: (inputs.hidden_states,), prepend=True)
        model.model(IDS, use_cache=False)
        taken.remove()
        entry.remove()
    expected = states[0]
    assert_close(stack.run(1, inputs.hidden_states, inputs, keep_ratio=1 / 3), expected)
    assert not torch.allclose(expected, plain)
    assert "forward" not in vars(layer), "the stack leaves the model as it is"


@torch.no_grad()
def test_the_stack_of_a_search_looks_at_every_run() -> None:
    model = tiny("llama-3")
    layer = model.model.layers[1]
    stack = LayerStack(model)
    inputs = stack.embed(IDS)
    plain = stack.run(1, inputs.hidden_states, inputs, keep_ratio=1 / 3)
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs) * 2
    with pytest.raises(OrthoRankError, match="the layer has a forward of its own"):
        stack.run(1, inputs.hidden_states, inputs, keep_ratio=1 / 3)
    del layer.forward
    assert torch.equal(stack.run(1, inputs.hidden_states, inputs, keep_ratio=1 / 3), plain)
