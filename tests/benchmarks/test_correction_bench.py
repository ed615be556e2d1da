"""What the rows of `bench_correction.py` measure, on a small model, is what the package's own ways give."""

import dataclasses
from typing import Any

import pytest
import torch

from benchmarks.bench_correction import said, slope
from benchmarks.correction.fits import BothWindows, KeyValueWindows, mapped, run_both
from benchmarks.frontier.losses import TextLosses
from benchmarks.frontier.path import Path_
from orthorank import OrthoRankConfig, apply, fit_correction
from orthorank.calibration.corrections import fit_layers
from orthorank.calibration.fitting import FitWindows
from orthorank.correction import Correction, LayerMap
from orthorank.evaluation import perplexity
from tests.orthorank.plain_search import random_windows, small_stack

PLAN = OrthoRankConfig(layers=[2, 3, 5], keep_ratio=0.4, keep_ratios={3: 0.0})


def fitted(stack: Any, windows: type[FitWindows], target: str = "dense") -> tuple[Any, dict[int, LayerMap]]:
    """What fits, after it did, and the maps that it found."""
    made: list[Any] = []

    def make(*args: Any, **options: Any) -> Any:
        made.append(windows(*args, **options))
        return made[0]

    how: Any = {"rank": 16, "target": target, "thresholds": False, "fit_windows": make}
    walk = fit_layers(stack.model, random_windows(8, 40), PLAN, **how)
    maps = {layer: found.layer_map for layer, _, found in walk if found is not None}
    return made[0], maps


def test_losses_are_those_of_the_applied_plan() -> None:
    stack, texts = small_stack(), {"a": random_windows(3, 30), "b": random_windows(2, 17)}
    losses = TextLosses(stack, texts, 2)
    corrected = fit_correction(stack.model, random_windows(8, 40), PLAN, rank=4)
    scored = dataclasses.replace(PLAN, criterion="inverse", layers=[2, 5], keep_ratios={})
    windows = dataclasses.replace(PLAN, select="window", select_window=8)
    for plan in (
        None,
        corrected,
        PLAN,
        scored,
        windows,
        corrected,
    ):  # each once more after another: nothing is kept of it
        found = losses.of(plan)
        with apply(stack.model, plan or OrthoRankConfig(layers=[])):
            for name, ids in texts.items():
                assert found[name] == pytest.approx(list(perplexity(stack.model, ids).window_losses), abs=1e-5)
    with pytest.raises(ValueError, match="changes layer 1"):
        losses.of(OrthoRankConfig(layers=[1]))


def test_keys_and_values_are_a_map_of_the_state() -> None:
    """No more is explained than by the state itself, and the map's rows lie in the space of the two weights."""
    stack = small_stack(num_key_value_heads=1)
    _, maps = fitted(stack, KeyValueWindows)
    attention = stack.layers[2].self_attn
    weight = torch.cat([attention.k_proj.weight, attention.v_proj.weight]).detach()
    outside = maps[2].down - maps[2].down @ torch.linalg.pinv(weight) @ weight
    assert weight.shape[0] < stack.model.config.hidden_size
    assert outside.abs().max() < 1e-4 * maps[2].down.abs().max()
    assert maps[2].down.abs().max() > 0


def test_selected_tokens_get_what_they_miss() -> None:
    """Those of layer 2 are right as they are. Behind it the states are others, and something is missing."""
    stack = small_stack()
    windows, maps = fitted(stack, BothWindows)
    assert list(windows.also) == [5]
    assert windows.also[5].up.shape == (32, 16)
    texts = {"fit": random_windows(8, 40)}
    plan = dataclasses.replace(PLAN, correction=Correction(maps))
    losses = TextLosses(stack, texts, 2)
    assert losses.of(plan)["fit"] != losses.of(plan, windows.also)["fit"]
    ids = texts["fit"]
    inputs = stack.embed(ids)
    hidden = inputs.hidden_states
    only = run_both(stack, 5, hidden, inputs, 0.4, None, layer_map=maps[5])
    both = run_both(stack, 5, hidden, inputs, 0.4, windows.also[5], layer_map=maps[5])
    changed = (only != both).any(-1)
    assert changed.sum(1).tolist() == [16] * 8
    assert not changed[:, 0].any(), "the sink is never corrected"
    assert torch.allclose((both - only)[changed], mapped(windows.also[5], stack.normed(5, hidden)[changed]), atol=1e-4)


def test_what_a_flop_is_worth() -> None:
    path = Path_("", changes=[(1, 0.0), (2, 0.0)], losses=[3.0, 3.1, 3.4], flops=[1.0, 0.9, 0.8])
    assert slope(path, 1) == pytest.approx(-2.0)
    assert slope(path, 2) == pytest.approx(-3.0)


def test_more_flops_are_paid_for() -> None:
    """A row that is better by what its FLOPs would have bought is level."""
    usual = {"name": "usual", "flops": 0.80, "losses": {"a": [3.0, 3.2]}}
    more = {"name": "more", "flops": 0.81, "losses": {"a": [2.97, 3.17]}}
    apart = said(more, usual, worth=-3.0)["against_usual"]["a"]
    assert apart["difference"] == pytest.approx(-0.03)
    assert apart["at_equal_flops"] == pytest.approx(0.0, abs=1e-9)
    assert said(usual, usual, worth=-3.0)["against_usual"] == {}
