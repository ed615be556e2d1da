"""FLOP counts against the published ideals, against PyTorch's own counter, and their edges."""

from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, apply
from orthorank.common.errors import OrthoRankError
from orthorank.stack.flops import flop_speedup, layer_cost, prefill_flops
from tests.orthorank.models import MODELS, tiny

NO_WINDOW = {"sliding_window": 64}  # wider than the prompt


def config(layers: int, hidden: int, mlp: int, heads: int, kv_heads: int, vocabulary: int, **more: Any) -> Any:
    return SimpleNamespace(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        **more,
    )


LLAMA2_7B = config(32, 4096, 11008, 32, 32, 32000)
LLAMA2_13B = config(40, 5120, 13824, 40, 40, 32000)
LLAMA2_70B = config(80, 8192, 28672, 64, 8, 32000)
LLAMA3_8B = config(32, 4096, 14336, 32, 8, 128256)
MISTRAL_7B = config(32, 4096, 14336, 32, 8, 32000, sliding_window=4096)


@pytest.mark.parametrize(
    ("model", "layers", "with_all_logits", "with_last_logits"),
    [
        (LLAMA2_7B, 9, 1.183, 1.187),
        (LLAMA2_13B, 12, 1.199, 1.202),
        (MISTRAL_7B, 9, 1.216, 1.220),
        (LLAMA2_70B, 24, 1.243, 1.244),
    ],
)
def test_ideals_at_20_percent(model: Any, layers: int, with_all_logits: float, with_last_logits: float) -> None:
    """Prompts of 2048. The figures usually quoted, such as 1.183, have the head on all tokens, on both sides."""
    selected = range(3, 3 + layers)
    assert round(flop_speedup(model, 2048, selected, 1 / 3, logits="all"), 3) == with_all_logits
    assert round(flop_speedup(model, 2048, selected, 1 / 3), 3) == with_last_logits


def test_a_multiple_costs_what_it_updates() -> None:
    of_multiple = prefill_flops(LLAMA2_7B, 2048, [5], 1 / 3, keep_multiple=128)
    assert of_multiple == prefill_flops(LLAMA2_7B, 2048, [5], 768 / 2048) > prefill_flops(LLAMA2_7B, 2048, [5], 1 / 3)


def test_cost_of_a_selected_layer() -> None:
    assert round(layer_cost(LLAMA2_7B, 2048, 1 / 3), 2) == 0.44
    assert round(layer_cost(LLAMA3_8B, 2048, 1 / 3), 2) == 0.36
    assert layer_cost(LLAMA2_7B, 2048, 1.0) == 1.0
    assert layer_cost(LLAMA2_7B, 2048, 0.0) == 0.0


def test_identities() -> None:
    dense = prefill_flops(LLAMA2_7B, 2048)
    assert prefill_flops(LLAMA2_7B, 2048, range(9), 1.0) == dense
    removed = prefill_flops(LLAMA2_7B, 2048, range(6), 0.0)
    shorter = config(26, 4096, 11008, 32, 32, 32000)
    assert removed == pytest.approx(prefill_flops(shorter, 2048), rel=1e-12)
    assert prefill_flops(LLAMA2_7B, 2048, [4, 4], 0.5) == prefill_flops(LLAMA2_7B, 2048, [4], 0.5)


@pytest.mark.parametrize("logits", ["last", "all"])
def test_as_pytorch_counts(tiny_model: Any, logits: str) -> None:
    """PyTorch's counter on a real forward; it counts attention without the causal half, which is added here."""
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model("llama", num_hidden_layers=2)
    model.set_attn_implementation("eager")  # so that attention is matrix products, all N x N of them
    tokens = 24
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None], use_cache=False, logits_to_keep=1 if logits == "last" else 0)
    upper_half = 2 * (4 * 64 * tokens * tokens / 2)  # layers x (QK and PV) over the query width of 4 x 16
    rotary = 2 * 8 * tokens  # the angles are a matrix product of positions and frequencies, once
    counted = counter.get_total_flops() - upper_half
    assert prefill_flops(model.config, tokens, logits=logits) == pytest.approx(counted, abs=rotary)


@pytest.mark.parametrize("name", MODELS)
def test_every_family_as_pytorch_counts(name: str) -> None:
    """Dense, and the products of a selected layer: the counter does not look into the attention op, which is added."""
    from torch.utils.flop_counter import FlopCounterMode

    tokens, layers = 24, 4
    model = tiny(name, attention="eager", **({} if "sliding_window" not in MODELS[name].settings else NO_WINDOW))
    model.set_experts_implementation("eager")  # one product for each expert, on the tokens that it gets
    query = 4 * model.model.layers[0].self_attn.head_dim

    def counted(*plan: Any) -> float:
        with ExitStack() as inside, torch.no_grad():
            for one in plan:
                inside.enter_context(apply(model, one))
            counter = inside.enter_context(FlopCounterMode(display=False))
            model(torch.arange(tokens)[None], use_cache=False, logits_to_keep=1)
        return counter.get_total_flops()

    rotary = 4 * 16 * tokens  # the angles may be a matrix product of positions and frequencies
    dense = counted()
    upper_half = layers * 4 * query * tokens * tokens / 2
    assert prefill_flops(model.config, tokens) == pytest.approx(dense - upper_half, abs=rotary)
    selected = counted(OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3))
    attention = 2 * 4 * query * 8 * tokens / 2  # of the two selected layers
    dense_attention = 2 * 4 * query * tokens * tokens / 2
    expected = prefill_flops(model.config, tokens, [1, 2], 1 / 3) - attention
    assert expected == pytest.approx(selected - upper_half + dense_attention, abs=rotary)


def test_sliding_window_counts_the_window() -> None:
    def attention(window: int | None, **more: Any) -> float:
        model = config(1, 64, 1, 4, 4, 1, head_dim=16, sliding_window=window, **more)
        return prefill_flops(model, 100) - prefill_flops(config(1, 64, 1, 4, 4, 1, head_dim=16), 100)

    pairs = 100 * 100 / 2
    windowed = 100 * 20 - 20 * 20 / 2
    assert attention(20) == pytest.approx(4 * 64 * (windowed - pairs))
    assert attention(100) == attention(500) == attention(None) == 0
    assert attention(20, use_sliding_window=False) == 0
    assert attention(20, layer_types=["full_attention"]) == 0
    assert attention(20, layer_types=["sliding_attention"]) == attention(20)


def test_head_dim_of_its_own() -> None:
    narrow, wide = (config(1, 64, 1, 4, 2, 1, head_dim=dim) for dim in (16, 32))
    # keys, values, queries, output: 2 * 2 * N * D * (C + Q); attention: 2 * Q * N * N
    expected = 4 * 10 * 64 * (32 + 64) + 2 * 64 * 100
    assert prefill_flops(wide, 10) - prefill_flops(narrow, 10) == expected


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"keep_ratio": 1.5}, "keep_ratio is 1.5"),
        ({"layers": [32]}, "layers holds 32; the model has layers 0 to 31"),
        ({"logits": "some"}, "last or all"),
        ({"config": config(32, 4096, 11008, 32, 32, 32000, num_local_experts=8)}, "mixture of experts"),
        ({"config": config(2, 64, 64, 4, 4, 64, model_type="gpt_neox")}, "type 'gpt_neox'; what its layers compute"),
        ({"config": SimpleNamespace(num_hidden_layers=2)}, "hidden_size = None"),
    ],
)
def test_errors(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        prefill_flops(**({"config": LLAMA2_7B, "tokens": 2048} | arguments))
