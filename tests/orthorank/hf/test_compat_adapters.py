"""Projections that are not plain linear layers: quantised by torchao, adapted by PEFT; and what is saved of a model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import orthorank
from orthorank import OrthoRankConfig, apply
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny
from tests.orthorank.statement import assert_close, logits

PROJECTIONS = {
    "llama-3": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi-3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
}


def selected(model: Any, ids: Tensor, plan: OrthoRankConfig) -> Tensor:
    """Logits under the plan, which is taken off again."""
    with apply(model, plan), torch.no_grad():
        return model(ids).logits


def stated(model: Any, ids: Tensor, plan: OrthoRankConfig) -> Tensor:
    """The same, as the method is stated."""
    return logits(model, ids, plan.layers, k=6, maps=None if plan.correction is None else plan.correction.maps)


@pytest.fixture(params=sorted(PROJECTIONS))
def name(request: pytest.FixtureRequest) -> str:
    """A model with three projections for queries, keys and values, and one with one."""
    return request.param


@pytest.mark.parametrize("when", ["before", "after"])
def test_linear_layers_quantised_by_torchao(name: str, when: str, plan: OrthoRankConfig) -> None:
    """int8 weights: the statement of the method on the quantised model, quantised before or after the plan."""
    torchao = pytest.importorskip("torchao.quantization")
    ids = ids_of(1, 20)
    plain, model = tiny(name), tiny(name)
    if when == "before":
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        actual = selected(model, ids, plan)
    else:
        with apply(model, plan), torch.no_grad():
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
            actual = model(ids).logits
    assert type(model.model.layers[1].self_attn.o_proj.weight) is not torch.nn.Parameter
    expected = stated(model, ids, plan)
    assert_close(actual, expected)
    change = (expected - stated(plain, ids, plan)).abs().max() / expected.abs().max()
    assert change > 1e-4, "int8 weights are other weights"


def test_a_model_loaded_as_int8(name: str, tmp_path: Path, plan: OrthoRankConfig) -> None:
    """transformers' own way: quantised while loading; generation too."""
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    tiny(name).save_pretrained(tmp_path)
    settings = TorchAoConfig(Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, dtype=torch.float32).eval()
    assert type(model.model.layers[1].self_attn.o_proj.weight) is not torch.nn.Parameter
    ids = ids_of(1, 20)
    assert_close(selected(model, ids, plan), stated(model, ids, plan))
    with apply(model, plan) as handle:
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert tokens.shape[1] <= 23
        assert handle.stats[1].tokens_updated == 6 + tokens.shape[1] - 21


def adapted(model: Any, name: str) -> Any:
    """``model`` with LoRA on every projection, at random: adapters that start at zero would change nothing."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=PROJECTIONS[name], init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings).eval()


@torch.no_grad()
def test_adapters_of_peft(name: str, plan: OrthoRankConfig) -> None:
    """Adapted before or after the plan is applied, through its model or the one inside, and merged under the plan."""
    ids = ids_of(1, 20)
    reference = adapted(tiny(name), name)
    expected = stated(reference.get_base_model(), ids, plan)
    assert (expected - stated(tiny(name), ids, plan)).abs().max() > 0.1
    tokens = None
    for before, inside in ((True, False), (True, True), (False, False)):
        model = tiny(name)
        if before:
            wrapped = adapted(model, name)
            handle = apply(model if inside else wrapped, plan)
        else:
            handle = apply(model, plan)
            wrapped = adapted(model, name)
        assert orthorank.handle_of(wrapped) is orthorank.handle_of(model) is handle
        assert_close(wrapped(ids).logits, expected)
        assert handle.stats[1].tokens_updated == 6
        generated = wrapped.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        tokens = generated if tokens is None else tokens
        assert torch.equal(generated, tokens)

        with wrapped.disable_adapter():
            assert_close(wrapped(ids).logits, stated(tiny(name), ids, plan))
        merged = wrapped.merge_and_unload()
        assert merged is model
        assert type(model.model.layers[1].self_attn.o_proj) is torch.nn.Linear
        assert_close(model(ids).logits, expected, relative=1e-4)
        handle.remove()
        assert_close(model(ids).logits, reference(ids).logits, relative=1e-4)


def test_training_an_adapter_under_the_plan(plan: OrthoRankConfig) -> None:
    """Gradients reach the adapters of selected layers alone where everything else is frozen, and a step helps."""
    ids = ids_of(2, 20)
    wrapped = adapted(tiny("llama-3"), "llama-3").train()
    with apply(wrapped, plan):
        optimiser = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(4):
            loss = wrapped(input_ids=ids, labels=ids).loss
            losses.append(float(loss.detach()))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert losses == sorted(losses, reverse=True)
    for key, weight in wrapped.named_parameters():
        assert (weight.grad is not None and bool((weight.grad != 0).any())) == ("lora_" in key), key


def folder_contents(folder: Path) -> dict[str, Any]:
    """Tensors and settings that lie in a saved model's folder."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            found |= load_file(path)
        else:
            found[path.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def test_saving_a_patched_model_saves_the_model(name: str, tmp_path: Path, plan: OrthoRankConfig) -> None:
    """The same files as without the plan, bit for bit; what is loaded from them is dense."""
    from transformers import AutoModelForCausalLM

    model, ids = tiny(name), ids_of(2, 20)
    model.save_pretrained(tmp_path / "dense")
    with torch.no_grad():
        dense = model(ids).logits
        with apply(model, plan):
            selecting = model(ids).logits
            model.generate(ids, max_new_tokens=2, pad_token_id=0)
            model.save_pretrained(tmp_path / "patched")
    before, after = folder_contents(tmp_path / "dense"), folder_contents(tmp_path / "patched")
    assert sorted(before) == sorted(after)
    for key, value in before.items():
        assert torch.equal(after[key], value) if isinstance(value, Tensor) else after[key] == value, key
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "patched", dtype=torch.float32).eval()
    assert orthorank.handle_of(loaded) is None
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, dense)
    assert torch.equal(selected(loaded, ids, plan), selecting)
