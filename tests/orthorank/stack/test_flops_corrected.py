"""The maps of a corrected plan are in every figure of FLOPs: as PyTorch counts its own products."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction, LayerMap
from orthorank.speed.bench_results import flop_speedup_of
from orthorank.stack.flops import flop_speedup, plan_flops, plan_speedup, prefill_flops

RANK, TOKENS = 8, 60
MAPS = Correction(dict.fromkeys([1, 2], LayerMap(torch.ones(RANK, 64), torch.ones(64, RANK), torch.ones(64))))
BARE = OrthoRankConfig(layers=[1, 2], keep_ratios={1: 0.0, 2: 0.5})
CORRECTED = OrthoRankConfig(layers=[1, 2], keep_ratios={1: 0.0, 2: 0.5}, correction=MAPS)


@torch.no_grad()
def counted(model: Any, plan: OrthoRankConfig) -> int:
    def of_map(states: Any, low: Any, up: Any, *_: Any, **__: Any) -> int:
        return 2 * up[0] * math.prod(low)

    # The counter does not look into an operator: the product inside is told to it by its shapes.
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.orthorank_kernels.add_low_rank: of_map})
    with apply(model, plan), counter:
        model(torch.arange(TOKENS)[None], use_cache=False)
    return counter.get_total_flops()


def test_what_maps_add_is_what_is_computed(tiny_model: Any) -> None:
    model = tiny_model("llama")
    without, with_maps = (
        prefill_flops(model.config, TOKENS, p.layers, p.ratios, ranks=p.ranks) for p in (BARE, CORRECTED)
    )
    assert with_maps - without == counted(model, CORRECTED) - counted(model, BARE) == 2 * 4 * TOKENS * RANK * 64


def test_every_figure_of_a_plan_has_them(tiny_model: Any) -> None:
    config = tiny_model("llama").config
    wanted = flop_speedup(config, TOKENS, [1, 2], CORRECTED.ratios, ranks={1: RANK, 2: RANK})
    assert flop_speedup_of(config, CORRECTED, TOKENS) == wanted < flop_speedup_of(config, BARE, TOKENS)


def test_prompts_below_the_least_pass_selecting_layers_whole(tiny_model: Any) -> None:
    """And the maps of these are not for them; that of a removed layer is."""
    model = tiny_model("llama")
    least, short, bare = (
        dataclasses.replace(plan, min_prompt=TOKENS + more)
        for plan, more in ((CORRECTED, 0), (CORRECTED, 1), (BARE, 1))
    )
    assert plan_flops(model.config, TOKENS, least) == plan_flops(model.config, TOKENS, CORRECTED)
    removed = prefill_flops(model.config, TOKENS, [1], 0.0, ranks={1: RANK})
    assert plan_flops(model.config, TOKENS, short) == removed > plan_flops(model.config, TOKENS, CORRECTED)
    assert plan_flops(model.config, TOKENS, bare, ranks={1: RANK, 2: RANK}) == removed
    assert plan_speedup(model.config, TOKENS, short) == flop_speedup(model.config, TOKENS, [1], 0.0, ranks={1: RANK})
    assert counted(model, short) - counted(model, bare) == 4 * TOKENS * RANK * 64


def test_a_rank_of_a_layer_that_is_not_changed(tiny_model: Any) -> None:
    with pytest.raises(OrthoRankError, match=r"ranks has the key 3; maps are of the layers given, \[1\]"):
        prefill_flops(tiny_model("llama").config, 10, [1], 0.5, ranks={3: 4})
