"""Random models of real shapes, and the attention that is the same in eager, traced, dense and patched models."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from torch.nn import functional

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.speed.random_weights import random_model, read_config, shipped_configs, unsearched_plans
from orthorank.speed.timing import time_prefill
from orthorank.stack import causal_attention, flops

TINY = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
PLAN = OrthoRankConfig(layers=[2, 4], keep_ratio=1 / 3)
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json as the hub has it."""
    file = tmp_path_factory.mktemp("tiny") / "config.json"
    file.write_text(json.dumps(TINY), encoding="utf-8")
    return file


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What `scaled_dot_product_attention` is called with, traced or not: shapes and keywords."""
    seen: list[dict[str, Any]] = []
    original = functional.scaled_dot_product_attention

    def recorded(query: Any, key: Any, value: Any, **kwargs: Any) -> Any:
        seen.append(kwargs | {"heads": (query.shape[1], key.shape[1])})
        return original(query, key, value, **kwargs)

    torch._dynamo.reset()
    monkeypatch.setattr(functional, "scaled_dot_product_attention", recorded)
    yield seen
    torch._dynamo.reset()


def in_graph(model: torch.nn.Module) -> list[dict[str, Any]]:
    """What SDPA is called with in the graphs that Dynamo makes of ``model``."""
    found: list[dict[str, Any]] = []

    def backend(graph: torch.fx.GraphModule, examples: list[Any]) -> Any:
        for node in graph.graph.nodes:
            if "scaled_dot_product_attention" in str(node.target):
                assert len(node.args) == 3
                heads = tuple(node.args[i].meta["example_value"].shape[1] for i in (0, 1))
                found.append(dict(node.kwargs) | {"heads": heads})
        return graph.forward

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(IDS, use_cache=False)
    torch._dynamo.reset()
    return found


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "plan"])
@torch.no_grad()
def test_every_dense_layer_is_causal_and_grouped_in_eager_compiled_and_exported_models(
    plan: OrthoRankConfig | None, tiny_config: Path, given: list[dict[str, Any]]
) -> None:
    model = random_model(tiny_config, device="cpu", dtype="float32")
    dense = TINY["num_hidden_layers"] - (0 if plan is None else len(plan.layers))
    handle = None if plan is None else apply(model, plan)
    model(IDS, use_cache=False)
    eager = [call for call in given if "enable_gqa" in call and call.get("attn_mask") is None and call["is_causal"]]
    assert len(eager) == dense
    traced = [call for call in in_graph(model) if call.get("is_causal")]
    assert len(traced) == dense
    for call in (*eager, *traced):
        assert call["enable_gqa"] is True
        assert call.get("attn_mask") is None
        assert call["heads"] == (4, 2)
    if handle is None:
        exported = torch.export.export(model, (IDS,), {"use_cache": False}).graph_module
        calls = [n for n in exported.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
        assert len(calls) == dense
        for node in calls:  # query, key, value, mask, dropout, is_causal, with enable_gqa by name
            assert (node.args[3:6] == (None, 0.0, True)) or node.kwargs.get("is_causal") is True
            assert node.kwargs["enable_gqa"] is True


@torch.no_grad()
def test_transformers_own_attention_is_another_one_when_compiled(tiny_config: Path) -> None:
    """Why the attention is registered: if this fails, transformers has mended it, and "sdpa" would do."""
    model = random_model(tiny_config, device="cpu", dtype="float32", attention="sdpa")
    assert any(call.get("attn_mask") is not None or call["heads"] != (4, 2) for call in in_graph(model))


@torch.no_grad()
def test_it_computes_what_sdpa_computes(tiny_config: Path) -> None:
    model = random_model(tiny_config, device="cpu", dtype="float32", attention="sdpa")
    ones = torch.ones_like(IDS)
    for plan in (None, PLAN):
        model.set_attn_implementation("sdpa")
        handle = None if plan is None else apply(model, plan)
        expected = model(IDS).logits
        model.set_attn_implementation(causal_attention.register_causal_attention())
        torch.testing.assert_close(model(IDS).logits, expected)
        torch.testing.assert_close(model(IDS, attention_mask=ones).logits, expected)
        if handle is not None:
            handle.remove()
    model.set_attn_implementation("sdpa")
    prompt = IDS + 1  # `generate()` takes tokens with the id of the pads for padding
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    model.set_attn_implementation("sdpa_causal")
    assert model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0).equal(expected)


@torch.no_grad()
def test_what_needs_a_mask_is_refused_by_name(tiny_config: Path, tmp_path: Path) -> None:
    from transformers import DynamicCache, StaticCache

    model = random_model(tiny_config, device="cpu", dtype="float32")
    padded = torch.ones_like(IDS)
    padded[0, :3] = 0
    with pytest.raises(OrthoRankError, match=r"attention_mask has padding, and the attention 'sdpa_causal'"):
        model(IDS, attention_mask=padded)
    with apply(model, PLAN), pytest.raises(OrthoRankError, match="attention_mask has padding"):
        model(IDS, attention_mask=padded)
    with pytest.raises(OrthoRankError, match=r"attention_mask is a tensor of shape \[2, 1, 12, 12\]"):
        model(IDS, attention_mask=torch.ones(2, 1, 12, 12, dtype=torch.bool))
    with pytest.raises(OrthoRankError, match="allocated ahead of time"):
        model(IDS, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    cache = DynamicCache(config=model.config)
    model(IDS, past_key_values=cache)
    with pytest.raises(OrthoRankError, match="12 tokens and 24 keys"):
        model(IDS, past_key_values=cache)
    with pytest.raises(OrthoRankError, match="cu_seq_lens_q was given"):
        model(IDS, cu_seq_lens_q=torch.tensor([0, 12]))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(TINY | {"model_type": "mistral", "sliding_window": 8}), encoding="utf-8")
    sliding = random_model(file, device="cpu", dtype="float32")
    with pytest.raises(OrthoRankError, match="a sliding window of 8 and 12 keys"):
        sliding(IDS)
    assert sliding(IDS[:, :8]).logits.isfinite().all()
    capped = TINY | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 64}
    file.write_text(json.dumps(capped), encoding="utf-8")
    with pytest.raises(OrthoRankError, match=r"'sdpa_causal' is refused by transformers: Gemma2|caps scores at 50.0"):
        random_model(file, device="cpu", dtype="float32")(IDS, use_cache=False)  # some versions let it be made
    states = torch.zeros(1, 2, 4, 8)
    with pytest.raises(OrthoRankError, match=r"caps scores at 50.0"):
        causal_attention.causal_attention(model, states, states, states, None, softcap=50.0)


SIZES = {  # parameters, as the models' pages say them, and groups of query heads
    "llama-2-7b": (6_738_415_616, 1),
    "llama-3-8b": (8_030_261_248, 4),
    "mistral-7b": (7_248_023_552, 4),
    "qwen2.5-7b": (7_615_616_512, 7),
}


@pytest.mark.parametrize("name", SIZES)
def test_the_shipped_configurations_have_their_models_number_of_parameters(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = read_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters, groups = SIZES[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    sizes = flops.Dimensions.of(config)
    assert (sizes.query // sizes.key, sizes.query) == (groups, config.hidden_size)
    assert set(sizes.windows) == {None}
    assert set(shipped_configs()) == set(SIZES)


def test_weights_depend_on_the_seed_alone(tiny_config: Path) -> None:
    state = torch.random.get_rng_state()
    first, same, other = (random_model(tiny_config, device="cpu", dtype="bfloat16", seed=s) for s in (3, 3, 4))
    assert torch.random.get_rng_state().equal(state)
    assert first.dtype == torch.bfloat16
    assert not first.training
    weights = [model.state_dict() for model in (first, same, other)]
    assert all(weights[0][key].equal(weights[1][key]) for key in weights[0])
    assert not weights[0]["model.layers.0.mlp.up_proj.weight"].equal(weights[2]["model.layers.0.mlp.up_proj.weight"])
    assert len(random_model(tiny_config.parent, device="cpu", dtype=None, layers=2).model.layers) == 2


def test_prefill_of_a_random_model_is_timed(tiny_config: Path) -> None:
    model = random_model(tiny_config, device="cpu", dtype="float32")
    variants = {"dense": None, **unsearched_plans(6)}
    assert {name: plan.layers for name, plan in unsearched_plans(6).items()} == {
        "layer pruning 20 %": [4],
        "orthorank 20 %": [4],
    }
    report = time_prefill(model, variants, IDS, rounds=2)
    assert list(report.timings) == list(variants)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("[1]", "cannot be read as a model's configuration"),
        ("{", "cannot be read as a model's configuration"),
        ('{"vocab_size": 4}', "cannot be read as a model's configuration"),
        ('{"model_type": "gpt2"}', "is of type 'gpt2', which has no spec; known are: Llama"),
    ],
)
def test_a_wrong_file_is_named(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(OrthoRankError, match=sentence):
        random_model(file, device="cpu", dtype=None)


def test_a_wrong_argument_is_named(tiny_config: Path) -> None:
    with pytest.raises(OrthoRankError, match=r"config 'llama-9' is no file; name a config.json .* llama-2-7b"):
        random_model("llama-9", device="cpu", dtype=None)
    for layers in (0, 7, True):
        with pytest.raises(OrthoRankError, match=rf"layers is {layers}; it must be an integer from 1 to the model's 6"):
            random_model(tiny_config, device="cpu", dtype=None, layers=layers)
