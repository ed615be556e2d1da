"""Every family: the identities, and the selected layer against the rows of the family's own dense layer."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import FAMILIES, OrthoRankConfig, OrthoRankError, apply, status
from orthorank.stack.layers import LayerStack
from tests.orthorank.hf.test_layer import Doubled, ids_of
from tests.orthorank.models import MODELS, has_windows, tiny, without_layers
from tests.orthorank.statement import DenseRows, assert_close, call

LENGTHS = (33, 20, 1, 2)
GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def padded(side: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """Ids and mask ``[rows, longest]``."""
    ids, longest = ids_of(len(lengths), max(lengths)), max(lengths)
    column, size = torch.arange(longest), torch.tensor(lengths)[:, None]
    mask = (column >= longest - size) if side == "left" else (column < size)
    return ids.masked_fill(~mask, 0), mask.long()


@pytest.fixture(autouse=True)
def _without_gradients(request: pytest.FixtureRequest) -> Iterator[None]:
    with torch.set_grad_enabled("gradient" in request.node.name):
        yield


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    """Each model of the table in turn."""
    return request.param


def test_every_family_has_a_model_and_windows_where_it_has_them() -> None:
    assert {model.model_type for model in MODELS.values()} == set(FAMILIES)
    windowed = {model.model_type for name, model in MODELS.items() if has_windows(tiny(name))}
    everything = {"llama", "gemma", "olmo2", "granite", "stablelm", "cohere"}
    everything |= {"seed_oss", "arcee", "nemotron", "helium", "glm", "ernie4_5"}
    assert windowed == set(FAMILIES) - everything


# Gemma 2 caps scores and GPT-OSS has sink logits, which sdpa does not do: transformers refuses the two together.
ATTENTIONS = [
    (name, attention)
    for name, model in MODELS.items()
    for attention in ("sdpa", "eager")
    if attention != "sdpa" or model.model_type not in ("gemma2", "gpt_oss")
]


def test_the_table_of_families_is_complete() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "families.md").read_text(encoding="utf-8")
    head, *rows = re.findall(r"^\| ([^|]+) \| `(\w+)` \|", page, flags=re.MULTILINE)
    assert head == ("family", "model_type")
    assert rows == [(family.name if key != "llama" else "Llama 2, 3", key) for key, family in FAMILIES.items()]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("name", "attention"), ATTENTIONS)
def test_a_padded_batch(name: str, attention: str, side: str) -> None:
    """Each row against the dense layer's own rows; every token selected against the dense model."""
    model = tiny(name, attention=attention)
    ids, mask = padded(side)
    real = mask.bool()
    with DenseRows(model, [0, 1, 2], 0.4) as rows:
        expected = rows(ids, mask)[real]
    dense = call(model, ids, mask)[real]
    with apply(model, OrthoRankConfig(layers=[0, 1, 2], keep_ratio=0.4)) as handle:
        assert_close(call(model, ids, mask)[real], expected)
        assert [handle.stats[i].tokens_updated for i in range(3)] == [13 + 8 + 0 + 0] * 3
    with apply(model, OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1 - 1e-9)):
        assert_close(call(model, ids, mask)[real], dense)
    with apply(model, OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1)):
        assert torch.equal(call(model, ids, mask)[real], dense)
    assert (expected - dense).abs().max() > 0.05 * dense.abs().max(), "the plan must change something"


def test_other_criteria(name: str) -> None:
    model = tiny(name)
    ids, mask = padded("right")
    real = mask.bool()
    seen = []
    for criterion in ("inverse", "prenorm", "cosine"):
        with DenseRows(model, [1, 2], 0.4, criterion=criterion) as rows:
            seen.append(rows(ids, mask)[real])
        with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4, criterion=criterion)):
            assert_close(call(model, ids, mask)[real], seen[-1])
    assert not torch.equal(seen[0], seen[1])


def test_gradients(name: str) -> None:
    """The reference path is differentiable: the loss's gradient in every weight is that of the dense rows."""
    model = tiny(name)
    ids, mask = padded("left", (20, 13))

    def gradients(logits: Tensor) -> dict[str, Tensor]:
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[mask.bool()], ids[mask.bool()]).backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    with DenseRows(model, [1, 2], 0.4) as rows:
        expected = gradients(rows(ids, mask))
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)):
        actual = gradients(call(model, ids, mask))
    assert expected.keys() == actual.keys()
    for key, gradient in expected.items():
        assert_close(actual[key], gradient, 1e-4)


def _caches(model: Any) -> dict[str, Any]:
    from transformers import DynamicCache, StaticCache

    return {"dynamic": DynamicCache(config=model.config), "static": StaticCache(model.config, max_cache_len=48)}


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_and_decoding_over_a_cache(name: str, kind: str) -> None:
    """Two chunks of a left-padded prompt, of which one row begins in the second, and tokens after it."""
    model = tiny(name)
    ids, mask = padded("left", (33, 20, 9))
    more = ids_of(3, 3, seed=1)
    ids, mask = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    steps = [(0, 22), (22, 33), (33, 34), (34, 35), (35, 36)]
    with DenseRows(model, [0, 1, 2], 0.4) as rows:
        cache = _caches(model)[kind]
        expected = [rows(ids[:, a:b], mask[:, :b], cache, dense=b - a == 1) for a, b in steps]
    cache = _caches(model)[kind]
    with apply(model, OrthoRankConfig(layers=[0, 1, 2], keep_ratio=0.4)):
        for (a, b), logits in zip(steps, expected, strict=True):
            real = mask[:, a:b].bool()
            assert_close(call(model, ids[:, a:b], mask[:, :b], cache)[real], logits[real])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(name: str, cache: str | None) -> None:
    model = tiny(name)
    ids, mask = padded("left", (19, 12))
    given, seen = ids, mask
    with DenseRows(model, [1, 2], 0.4, keep_last=1) as rows:
        dynamic = _caches(model)["dynamic"]
        logits = rows(ids, mask, dynamic)
        for _ in range(6):
            token = logits[:, -1:].argmax(-1)
            given, seen = torch.cat([given, token], 1), torch.cat([seen, torch.ones_like(token)], 1)
            logits = rows(token, seen, dynamic, dense=True)
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)):
        settings = GREEDY if cache is None else GREEDY | {"cache_implementation": cache}
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, **settings), given)


REMOVED = [[0], [1, 2]]


@pytest.mark.parametrize(
    "layers", [*REMOVED, *(pytest.param(others, marks=pytest.mark.slow) for others in ([0, 1], [0, 3], [2, 3], [3]))]
)
def test_ratio_zero_removes_the_layer(name: str, layers: list[int]) -> None:
    """Also where masks read how many tokens are cached from the removed layer: the first of its kind."""
    model = tiny(name)
    pruned = without_layers(model, layers)
    ids, mask = padded("left", (17, 12))
    real = mask.bool()
    logits = call(pruned, ids, mask)[real]
    tokens = pruned.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY)
    with apply(model, OrthoRankConfig(layers=layers, keep_ratio=0)) as handle:
        assert_close(call(model, ids, mask)[real], logits)
        cache = _caches(model)["dynamic"]
        halves = [call(model, ids[:, a:b], mask[:, :b], cache) for a, b in ((0, 11), (11, 17))]
        assert_close(torch.cat(halves, 1)[real], logits)
        assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=6, **GREEDY), tokens)
        static = {"cache_implementation": "static", "max_new_tokens": 6}
        assert torch.equal(model.generate(ids, attention_mask=mask, **static, **GREEDY), tokens)
        assert handle.stats[layers[0]].tokens_updated == 0


def test_the_stack_of_layers(name: str) -> None:
    """Layer by layer, with the model's own embedding (scaled in Gemma, Granite) and head (scaled or capped in some)."""
    model = tiny(name)
    ids = ids_of(2, 20)
    stack = LayerStack(model)
    inputs = stack.embed(ids)
    dense = selected = inputs.hidden_states
    for layer in range(stack.num_layers):
        dense = stack.run(layer, dense, inputs)
        selected = stack.run(layer, selected, inputs, keep_ratio=0.4 if layer in (1, 2) else 1.0)
    everything = torch.ones_like(ids)
    logits = call(model, ids, everything)
    assert_close(stack.logits(dense), logits)
    with DenseRows(model, [1, 2], 0.4) as rows:
        assert_close(stack.logits(selected), rows(ids, everything))
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
    assert_close(stack.token_losses(dense, ids), losses)
    assert "forward" not in vars(model.model)


def test_detection_of_the_sink_reads_every_family(name: str) -> None:
    from orthorank.stack.sink import detect_sink

    report = detect_sink(tiny(name), tokens=8)
    assert len(report.ratios) == 5
    assert all(math.isfinite(value) for value in (*report.ratios, *report.cos_self, *report.cos_others))


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "qwen2-moe-step", "qwen3-moe"])
def test_router_and_experts_see_the_selected_tokens_alone(name: str) -> None:
    model = tiny(name)
    seen: dict[str, int] = {}
    for key, module in model.named_modules():
        if key.split(".")[-1] in ("gate", "experts", "shared_expert"):
            module.register_forward_pre_hook(lambda _, args, key=key: seen.__setitem__(key, len(args[0])))
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=1 / 3)):
        model(ids_of(2, 30), use_cache=False)
    assert {key.rsplit(".", 1)[0] for key in seen} >= {"model.layers.1.mlp"}
    assert {key: rows for key, rows in seen.items() if rows != (20 if ".1." in key else 60)} == {}


def test_low_precision(name: str) -> None:
    """bfloat16 from end to end: as far from float32 as the dense model is, or not much farther."""
    model = tiny(name)
    ids, mask = padded("left", (33, 20))
    real = mask.bool()
    plan = OrthoRankConfig(layers=[0, 1, 2, 3], keep_ratio=1 - 1e-9)
    exact = call(model, ids, mask)[real]
    model = model.bfloat16()
    dense = call(model, ids, mask)[real].float()
    with apply(model, plan):
        selected = call(model, ids, mask)
    assert selected.dtype == torch.bfloat16
    errors = [float((logits - exact).pow(2).mean().sqrt() / exact.std()) for logits in (dense, selected[real].float())]
    assert errors[1] < 1.5 * errors[0] + 0.01, errors


@pytest.mark.parametrize("name", ["phi-3", "phi-3-mha", "stablelm"])
def test_dropout_of_the_residual_stream(name: str) -> None:
    """Training drops what is added where the family does."""
    rates = {"resid_pdrop": 1 - 1e-7} if name.startswith("phi") else {"hidden_dropout": 1 - 1e-7}
    model = tiny(name, **rates)
    layer, ids = model.model.layers[1], ids_of(1, 12)
    with apply(model, OrthoRankConfig(layers=[1], keep_ratio=0.5)):
        outputs = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        assert (outputs[2] - outputs[1]).abs().sum(-1).count_nonzero() == 6
        layer.train()
        outputs = model(ids, output_hidden_states=True, use_cache=False).hidden_states
    changed = outputs[2] - outputs[1]
    if name == "stablelm":  # attention is not dropped there
        assert changed.abs().sum(-1).count_nonzero() == 6
        changed = (
            changed
            - layer.self_attn(
                layer.input_layernorm(outputs[1]),
                position_embeddings=model.model.rotary_emb(outputs[1], torch.arange(12)[None]),
            )[0]
        )
        changed = changed[:, (outputs[2] != outputs[1]).any(-1)[0]]
    assert changed.abs().max() < 1e-5


def test_status_says_what_tokens_are_scored_on() -> None:
    for name, note in (("olmo-2", "OLMo-2 has no norm before attention"), ("llama-3", "")):
        model = tiny(name)
        with apply(model, OrthoRankConfig(layers=[1])):
            assert note in str(status(model))
            assert bool(status(model).note) == bool(note)


def test_attention_in_both_directions_is_refused() -> None:
    for name in ("gemma-2", "gemma-3"):
        model = tiny(name, use_bidirectional_attention=True)
        with pytest.raises(OrthoRankError, match="attends in both directions"):
            apply(model, OrthoRankConfig(layers=[1]))


def test_a_model_that_reads_images_is_refused() -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text = tiny("gemma-3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))
    with pytest.raises(OrthoRankError, match=r"Gemma3ForConditionalGeneration without decoder layers.*its text part"):
        apply(model, OrthoRankConfig(layers=[1]))


@pytest.mark.parametrize("changed", ["adapted", "hooked"])
def test_a_changed_fused_projection_runs_whole(changed: str) -> None:
    """A plain one is read by rows of its weight; what an adapter or a hook makes of it must not be lost."""
    model = tiny("phi-3")
    for layer in model.model.layers:
        if changed == "adapted":
            layer.self_attn.qkv_proj = Doubled(layer.self_attn.qkv_proj)
        else:
            layer.self_attn.qkv_proj.register_forward_hook(lambda module, args, output: 2 * output)
    ids, mask = padded("left", (33, 20))
    with DenseRows(model, [1, 2], 0.4) as rows:
        expected = rows(ids, mask)[mask.bool()]
    with DenseRows(tiny("phi-3"), [1, 2], 0.4) as rows:
        assert (rows(ids, mask)[mask.bool()] - expected).abs().max() > 0.1
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)):
        assert_close(call(model, ids, mask)[mask.bool()], expected)


@pytest.mark.parametrize("name", ["gemma-2", "phi-3", "olmo-2", "stablelm-parallel", "cohere-norms", "qwen2-moe"])
def test_weights_that_accelerate_offloads(name: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = tiny(name)
    ids, mask = padded("left", (20, 13))
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)):
        expected = call(model, ids, mask)[mask.bool()]
    accelerate.cpu_offload(model, torch.device("cpu"))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=0.4)):
        assert_close(call(model, ids, mask)[mask.bool()], expected)
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


@pytest.mark.slow
def test_compiled_whole(name: str) -> None:
    """Selected layers add no break to the graphs of the dense model."""
    import torch._dynamo

    model = tiny(name)
    ids = ids_of(2, 33)
    torch._dynamo.reset()
    breaks = torch._dynamo.explain(model)(ids, use_cache=False).graph_break_count
    with apply(model, OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)):
        expected = model(ids, use_cache=False).logits
        torch._dynamo.reset()
        assert torch._dynamo.explain(model)(ids, use_cache=False).graph_break_count == breaks
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=breaks == 0)
        assert_close(compiled(ids, use_cache=False).logits, expected)
