"""What hangs on a selected layer's parts and is not in a plan's way: transformers, accelerate, FSDP, profilers."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny
from tests.orthorank.statement import assert_close, logits

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
IDS = ids_of(1, 24)


@torch.no_grad()
def selected(model: Any) -> Tensor:
    with apply(model, PLAN):
        return model(IDS).logits


@pytest.fixture
def expected() -> Tensor:
    return selected(tiny("llama-3"))


@torch.no_grad()
def test_hooks_that_capture_outputs(expected: Tensor) -> None:
    """One dense call with output_attentions=True leaves them on every attention, before a plan or under it."""
    model = tiny("llama-3", attention="eager")
    model(IDS, output_attentions=True, output_hidden_states=True)
    assert model.model.layers[1].self_attn._forward_hooks, "nothing is captured, and this tests nothing"
    assert_close(selected(model), expected)
    model = tiny("llama-3", attention="eager")
    with apply(model, PLAN) as handle:
        with pytest.raises(OrthoRankError, match="output_attentions is True"):
            model(IDS, output_attentions=True)
        states = model(IDS, output_hidden_states=True).hidden_states
        assert len(states) == 5
        handle.remove()
        model(IDS, output_attentions=True)
        apply(model, PLAN)
        assert_close(model(IDS).logits, expected)


@torch.no_grad()
def test_hooks_of_accelerate(expected: Tensor) -> None:
    """What moves inputs and weights changes no value: on attention, on norms, and taken off again."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = tiny("llama-3")
    layer = model.model.layers[1]
    device = torch.device("cpu")
    hooks.add_hook_to_module(layer.self_attn, hooks.AlignDevicesHook(device, io_same_device=True))
    hooks.add_hook_to_module(layer.self_attn, hooks.ModelHook(), append=True)
    for norm in (layer.input_layernorm, layer.post_attention_layernorm):
        hooks.add_hook_to_module(norm, hooks.AlignDevicesHook(device, offload=True))
        assert norm.weight.device.type == "meta"
    assert torch.equal(selected(model), expected)
    assert torch.equal(selected(copy.deepcopy(model)), expected)
    hooks.remove_hook_from_module(layer, recurse=True)
    assert "forward" in vars(layer.self_attn), "accelerate leaves the method that was there, bound"
    assert torch.equal(selected(model), expected)

    class Doubles(hooks.ModelHook):
        def post_forward(self, module: Any, output: Any) -> Any:
            return output * 2

    hooks.add_hook_to_module(layer.input_layernorm, Doubles())  # not one that moves: the norm is called
    assert_close(selected(model), logits(model, IDS, PLAN.layers, k=8))
    assert not torch.allclose(selected(model), expected)


class OtherNorm(nn.Module):
    """As Liger-Kernel's: a class of its own, with the weights of the one it replaces."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)


@torch.no_grad()
@pytest.mark.parametrize("way", ["by class", "by instance"])
def test_norms_as_liger_puts_them(way: str, expected: Tensor) -> None:
    """New modules of another class; or the class's forward bound to each norm that is there."""
    model = tiny("llama-3")
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = getattr(layer, name)
            if way == "by class":
                setattr(layer, name, OtherNorm(norm))
            else:
                norm.forward = OtherNorm.forward.__get__(norm, type(norm))
                norm._get_name = lambda: OtherNorm.__name__
    assert_close(selected(model), expected)
    with apply(model, PLAN) as handle:
        model.generate(IDS, max_new_tokens=2, pad_token_id=0)
        assert handle.stats[1].tokens_updated == 8 + 1


@torch.no_grad()
def test_global_hooks_and_profilers(expected: Tensor) -> None:
    """They listen to every module that is called; a selected layer's attention is not among them."""
    model = tiny("llama-3")
    seen: list[str] = []
    hooks = [
        register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__)),
        register_module_forward_pre_hook(lambda module, args: None),
    ]
    try:
        assert torch.equal(selected(model), expected)
    finally:
        for hook in hooks:
            hook.remove()
    assert seen.count("LlamaDecoderLayer") == 4
    assert seen.count("LlamaAttention") == 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], with_modules=True):
        assert torch.equal(selected(model), expected)


@torch.no_grad()
def test_attention_that_was_compiled(expected: Tensor) -> None:
    """Compiled code computes the same: what is inside is taken apart."""
    model = tiny("llama-3")
    model.model.layers[1].self_attn.compile(backend="eager")
    layer = model.model.layers[2]
    layer.self_attn = torch.compile(layer.self_attn, backend="eager")
    assert torch.equal(selected(model), expected)
    for attention in (layer.self_attn, layer.self_attn._orig_mod):
        hook = attention.register_forward_hook(lambda *_: None)
        with pytest.raises(OrthoRankError, match=r"layer 2 selects tokens.*the forward hook"):
            apply(model, PLAN)
        hook.remove()
    assert torch.equal(selected(model), expected)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of one, for what shards over many."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@torch.no_grad()
def test_fully_sharded_layers(one_process: None, expected: Tensor) -> None:
    """FSDP 2 makes classes of its own, hangs its hooks on the layer, and gathers the weights before it runs."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shard = functools.partial(fully_shard, mesh=init_device_mesh("cpu", (1,)))
    for before in (True, False):
        model = tiny("llama-3")
        handle = None if before else apply(model, PLAN)
        for layer in model.model.layers:
            shard(layer)
        shard(model)
        assert type(model.model.layers[1]).__name__ == "FSDPLlamaDecoderLayer"
        handle = handle or apply(model, PLAN)
        assert_close(model(IDS).logits, expected)
        handle.remove()

    model = tiny("llama-3")
    for name in ("input_layernorm", "post_attention_layernorm"):  # sharded for itself: it gathers when it is called
        shard(getattr(model.model.layers[1], name))
    assert_close(selected(model), expected)
    shard(model.model.layers[2].self_attn)
    with pytest.raises(OrthoRankError, match=r"layer 2 selects tokens.*its self_attn has the forward"):
        apply(model, PLAN)
