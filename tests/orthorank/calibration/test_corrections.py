"""Maps fitted to text: a ridge regression written out, on states that a statement of the corrected layers leaves."""

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply, fit_correction
from orthorank.calibration import calibrate
from orthorank.hf.provenance import weights_fingerprint
from tests.orthorank import statement

WINDOWS, TOKENS, HIDDEN = 9, 30, 64
HELD_OUT = [3, 7]
PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=0.3, keep_ratios={2: 0.0})


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 128, (WINDOWS, TOKENS), generator=torch.Generator().manual_seed(0))


def states_of(model: Any, ids: Tensor) -> list[Tensor]:
    """What enters each layer of the dense model, and what leaves the last."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.extend([args[0], output]))
        for layer in model.model.layers
    ]
    try:
        model(ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [*seen[::2], seen[-1]]


def layer_of(model: Any, number: int, h: Tensor) -> Tensor:
    positions = torch.arange(h.shape[1])[None]
    rotary = model.model.rotary_emb(h, positions)
    output = model.model.layers[number](h, position_embeddings=rotary, attention_mask=None)
    return output[0] if isinstance(output, tuple) else output


def stated(
    model: Any, ids: Tensor, target: str, rank: int, ridges: dict[int, float]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Slope ``[hidden, hidden]`` and bias of each layer of `PLAN`, fitted on all windows with the ridges given."""
    dense = states_of(model, ids)
    h, found = dense[1], {}
    for number in (1, 2):
        layer = model.model.layers[number]
        x, output = layer.input_layernorm(h), layer_of(model, number, h)
        chosen = torch.zeros(h.shape[:2], dtype=torch.bool)
        if number == 1:
            for row in range(WINDOWS):
                chosen[row] = statement.selected_mask(statement.ranks("orthogonal", h[row], x[row]), int(0.3 * TOKENS))
        left = ~chosen
        left[:, 0] = False
        y = ((dense[number + 1] if target == "dense" else output) - h)[left].double()
        regressors = x[left].double()
        mean_x, mean_y = regressors.mean(0), y.mean(0)
        centred = regressors - mean_x
        gram = centred.T @ centred
        strength = ridges[number] * gram.diagonal().mean()
        slope = torch.linalg.solve(gram + strength * torch.eye(HIDDEN).double(), centred.T @ (y - mean_y))
        directions = torch.linalg.svd(centred @ slope, full_matrices=False).Vh[:rank].T
        slope = slope @ directions @ directions.T
        found[number] = slope, mean_y - mean_x @ slope
        moved = (h.double() + x.double() @ found[number][0] + found[number][1]).float()
        h = torch.where(chosen[..., None], output, torch.where(left[..., None], moved, h))
    return found


@pytest.mark.parametrize("rank", [HIDDEN, 5])
@pytest.mark.parametrize("target", ["dense", "layer"])
@torch.no_grad()
def test_maps_are_the_regression_written_out(tiny_model: Any, ids: Tensor, target: str, rank: int) -> None:
    model = tiny_model("llama")
    found = fit_correction(model, ids, PLAN, rank=rank, target=target, batch_size=4)
    record = found.calibration["correction"]
    ridges = {int(layer): ridge for layer, ridge in record["ridge"].items()}
    expected = stated(model, ids, target, rank, ridges)
    for layer, (slope, bias) in expected.items():
        parts = found.correction.maps[layer]
        statement.assert_close((parts.up @ parts.down).T.double(), slope, 1e-3)
        statement.assert_close(parts.bias.double(), bias, 1e-3)
    assert (found.layers, found.ratios, found.select) == (PLAN.layers, PLAN.ratios, "topk")


@torch.no_grad()
def test_the_ridge_and_the_share_are_those_of_held_out_windows(tiny_model: Any, ids: Tensor) -> None:
    """Of layer 1, whose states are the dense model's."""
    model = tiny_model("llama")
    plan = OrthoRankConfig(layers=[1], keep_ratio=0.0)
    record = fit_correction(model, ids, plan, rank=HIDDEN).calibration["correction"]
    assert record["held_out_windows"] == len(HELD_OUT)
    dense = states_of(model, ids)
    x, y = model.model.layers[1].input_layernorm(dense[1])[:, 1:].double(), (dense[2] - dense[1])[:, 1:].double()
    rest = [i for i in range(WINDOWS) if i not in HELD_OUT]
    shares = {}
    for ridge in (1e-4, 1e-3, 1e-2, 0.03, 0.1, 0.3, 1.0, 3.0):
        a, b = x[rest].flatten(0, 1), y[rest].flatten(0, 1)
        centred = a - a.mean(0)
        gram = centred.T @ centred
        slope = torch.linalg.solve(
            gram + ridge * gram.diagonal().mean() * torch.eye(HIDDEN).double(), centred.T @ (b - b.mean(0))
        )
        error = y[HELD_OUT] - (b.mean(0) + (x[HELD_OUT] - a.mean(0)) @ slope)
        shares[ridge] = float(1 - error.square().sum() / y[HELD_OUT].square().sum())
    best = max(shares, key=lambda each: shares[each])
    assert record["ridge"] == {"1": best}
    assert record["explained"]["1"] == pytest.approx(shares[best], abs=1e-4)


@pytest.mark.parametrize("target", ["dense", "layer"])
@torch.no_grad()
def test_states_come_nearer_to_the_dense_models(tiny_model: Any, family: str, ids: Tensor, target: str) -> None:
    """On windows that the fit never saw, drawn like its own."""
    model = tiny_model(family)
    windows = torch.randint(3, 128, (60, 40), generator=torch.Generator().manual_seed(5))
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=0.3, keep_ratios={2: 0.0})
    found = fit_correction(model, windows[:40], plan, rank=32, target=target)
    dense, off = model(windows[40:]).logits, []
    for each in (plan, found):
        with apply(model, each):
            off.append((model(windows[40:]).logits - dense).square().mean())
    assert off[1] < 0.9 * off[0]


@torch.no_grad()
def test_thresholds_are_found_on_corrected_states(tiny_model: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    plan = calibrate(model, ids, OrthoRankConfig(layers=[1, 2, 3], keep_ratio=0.4, keep_ratios={2: 0.0}))
    found = fit_correction(model, ids, plan, rank=16, batch_size=WINDOWS)
    assert found.thresholds[1] == plan.thresholds[1]
    assert found.thresholds[3] != plan.thresholds[3]
    with apply(model, found) as handle:
        model(ids, use_cache=False)
        for layer in (1, 3):
            assert handle.stats[layer].tokens_updated == int(0.4 * ids.numel())
    assert found.calibration["thresholds"]["achieved"] == {"1": 0.4, "3": 0.4}


@pytest.mark.parametrize(
    "fields",
    [
        {"select": "window", "select_window": 8},
        {"criterion": "inverse"},
        {"criterion": "random", "seed": 3},
        {"update_sink": True},
        {"kv": "selected"},
        {"sinks": "auto"},
    ],
)
def test_other_ways_to_select(tiny_model: Any, ids: Tensor, fields: dict[str, Any]) -> None:
    """The tokens that the maps are fitted on are those that the applied plan leaves out."""
    model = tiny_model("llama")
    seen: list[Tensor] = []
    plan = OrthoRankConfig(layers=[1], keep_ratio=0.3, **fields)
    found = fit_correction(model, ids, plan, rank=HIDDEN, target="layer")
    with apply(model, plan) as handle, handle.watching(lambda layer, positions, call: seen.append(positions)):
        h = torch.no_grad()(states_of)(model, ids)
    left = torch.ones(WINDOWS, TOKENS, dtype=torch.bool)
    for row, positions in enumerate(seen[0].tolist()):
        left[row, [0, *(at for at in positions if at >= 0)]] = False
    x = model.model.layers[1].input_layernorm(h[1])[left].detach().double()
    parts = found.correction.maps[1]
    means = x.mean(0) @ (parts.up @ parts.down).T.double() + parts.bias.double()
    with torch.no_grad():
        missing = (layer_of(model, 1, h[1]) - h[1])[left].double()
    statement.assert_close(
        means, missing.mean(0), 1e-4
    )  # a regression with a constant meets the mean, of these tokens alone


def test_the_same_again_and_in_other_batches(tiny_model: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    first = fit_correction(model, ids, PLAN, rank=8, batch_size=9)
    assert fit_correction(model, ids, PLAN, rank=8, batch_size=9) == first
    assert fit_correction(model, ids, first, rank=8, batch_size=9).correction == first.correction
    other = fit_correction(model, ids, PLAN, rank=8, batch_size=2)
    for layer in (1, 2):
        products = [each.correction.maps[layer].up @ each.correction.maps[layer].down for each in (first, other)]
        statement.assert_close(products[1], products[0], 1e-4)
    assert "_orthorank_handle" not in vars(model)


def test_what_a_plan_says_of_its_fit(tiny_model: Any, ids: Tensor, tmp_path: Any) -> None:
    model = tiny_model("llama")
    steps: list[Any] = []
    before = dataclasses.replace(PLAN, calibration={"text": "a"}, measured={"perplexity": 3})
    found = fit_correction(model, ids, before, rank=8, on_layer=lambda *given: steps.append(given))
    record = found.calibration["correction"]
    assert (record["rank"], record["target"], record["windows"], record["tokens"]) == (8, "dense", 9, 270)
    assert len(record["ids_sha256"]) == 64
    assert record["model_fingerprint"] == weights_fingerprint(model)
    assert (record["adapters"], record["model_license"]) == ([], None)
    assert (found.calibration["text"], found.measured) == ("a", {})
    assert [step[:2] for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert steps[0][2] is None
    assert round(steps[2][2], 4) == record["explained"]["2"]
    found.save_pretrained(tmp_path)
    assert OrthoRankConfig.from_pretrained(tmp_path) == found
    json.dumps(found.to_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"plan": OrthoRankConfig(layers=[1], keep_ratio=1.0)}, "leaves no token out"),
        ({"plan": OrthoRankConfig(layers=[9])}, "layers holds 9"),
        ({"rank": 65}, "rank is 65; it must be an integer from 1 to 64"),
        ({"rank": 0}, "rank is 0"),
        ({"target": "next"}, "target is 'next'; it may be dense or layer"),
        ({"input_ids": torch.ones(1, 9, dtype=torch.long)}, r"shape \[1, 9\]; .* at least 2 windows"),
        ({"input_ids": torch.ones(9, dtype=torch.long)}, r"shape \[9\]"),
        ({"plan": OrthoRankConfig(layers=[1], keep_ratio=0.99)}, "a layer leaves no token out in the windows"),
    ],
)
def test_what_cannot_be_fitted(tiny_model: Any, ids: Tensor, change: dict[str, Any], message: str) -> None:
    given = {"input_ids": ids[:4, :2] if "0.99" in str(change) else ids, "plan": PLAN, "rank": 8} | change
    with pytest.raises(OrthoRankError, match=message):
        fit_correction(tiny_model("llama"), given.pop("input_ids"), given.pop("plan"), **given)


def test_models_that_are_in_no_state_for_it(tiny_model: Any, ids: Tensor) -> None:
    model = tiny_model("llama")
    with pytest.raises(OrthoRankError, match="in training mode"):
        fit_correction(model.train(), ids, PLAN)
    model.eval()
    with apply(model, PLAN), pytest.raises(OrthoRankError, match="a plan is applied"):
        fit_correction(model, ids, PLAN, rank=8)


@pytest.mark.parametrize("target", ["dense", "layer"])
def test_calibrate_fits_the_maps_of_a_corrected_plan_anew(tiny_model: Any, ids: Tensor, target: str) -> None:
    """Thresholds and maps as if the plan with thresholds had been corrected."""
    model = tiny_model("llama")
    plan = OrthoRankConfig(layers=[1, 2, 3], keep_ratio=0.4, keep_ratios={2: 0.0})
    steps: list[Any] = []
    found = calibrate(
        model,
        ids,
        fit_correction(model, ids, plan, rank=8, target=target),
        decode="threshold",
        on_layer=lambda *given: steps.append(given),
    )
    expected = fit_correction(model, ids, calibrate(model, ids, plan), rank=8, target=target)
    assert (found.correction, found.thresholds) == (expected.correction, expected.thresholds)
    assert (found.select, found.decode, found.keep_ratios) == ("threshold", "threshold", {2: 0.0})
    assert found.calibration == expected.calibration
    assert steps == [(1, 4, None), (2, 4, found.thresholds[1]), (3, 4, None), (4, 4, found.thresholds[3])]
