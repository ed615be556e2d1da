"""Maps that are distilled: the loss and its gradient are what they should be, and a run can be stopped anywhere."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from orthorank import OrthoRankConfig, OrthoRankError, apply, distill_correction, fit_correction
from orthorank.calibration import calibrate
from orthorank.calibration.distilling import _Student
from orthorank.correction import LayerMap
from tests.orthorank.models import plain

PLANS = {
    "mixed": OrthoRankConfig(layers=[1, 2, 3], keep_ratio=0.4, keep_ratios={2: 0.0}),
    "windows": OrthoRankConfig(layers=[1, 3], keep_ratio=0.4, select="window", select_window=8),
    "removed": OrthoRankConfig(layers=[2], keep_ratio=0.0),
}


class Stopped(Exception):
    """Somebody ends the process."""


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 128, (8, 30), generator=torch.Generator().manual_seed(0))


def model_of(scale: float = 0.2) -> Any:
    return plain("llama", initializer_range=scale)


def divergence(model: Any, ids: Tensor, plan: OrthoRankConfig) -> float:
    """KL(dense || plan) in nats a token, from the logits of two whole forwards."""
    with torch.no_grad():
        dense = model(ids).logits.log_softmax(-1)
        with apply(model, plan):
            said = model(ids).logits.log_softmax(-1)
    return kl_div(said, dense, reduction="sum", log_target=True).item() / ids.numel()


@pytest.mark.parametrize("name", PLANS)
def test_the_loss_and_its_gradient(ids: Tensor, name: str) -> None:
    model = model_of()
    plan = fit_correction(model, ids, PLANS[name], rank=4)
    student = _Student(model.requires_grad_(False), ids, plan, 2)
    windows = torch.tensor([5, 0, 3])
    assert student.backward(windows) == pytest.approx(divergence(model, ids[windows], plan), rel=1e-4)
    top = max(plan.layers)  # what a map below changes may change which tokens are selected above
    draw = torch.Generator().manual_seed(1)
    directions = {name: torch.randn(student.parts[top, name].shape, generator=draw) for name in LayerMap._fields}
    slope = sum((student.parts[top, name].grad * directions[name]).sum().item() for name in directions)

    def moved(step: float) -> float:
        maps = {**plan.correction.maps}
        maps[top] = LayerMap(*(part + step * directions[at] for at, part in maps[top]._asdict().items()))
        changed = dataclasses.replace(plan, correction=type(plan.correction)(maps))
        return divergence(model, ids[windows], changed)

    assert slope == pytest.approx((moved(1e-3) - moved(-1e-3)) / 2e-3, rel=2e-2)
    assert abs(slope) > 1e-4


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_comes_nearer_to_the_dense_model(ids: Tensor, name: str) -> None:
    model = model_of()
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    fitted = fit_correction(model, ids, PLANS[name], rank=4)
    with torch.inference_mode():
        found = distill_correction(model, ids, fitted, steps=40, rate=0.05)
    assert divergence(model, ids, found) < 0.9 * divergence(model, ids, fitted)
    assert all(torch.equal(weights[name], weight) for name, weight in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    record = found.calibration["correction"]
    assert record["distilled"]["steps"] == 40
    assert record["distilled"]["kl"][1] < record["distilled"]["kl"][0]
    assert record["explained"] == fitted.calibration["correction"]["explained"]


@pytest.mark.parametrize("stop", [3, 11])
def test_a_run_that_goes_on_ends_with_the_same_bits(ids: Tensor, tmp_path: Path, stop: int) -> None:
    model, file = model_of(), tmp_path / "state"
    fitted = fit_correction(model, ids, PLANS["mixed"], rank=4)
    whole = distill_correction(model, ids, fitted, steps=14, seed=3)

    def end(done: int, *_: Any) -> None:
        if done == stop:
            raise Stopped

    with pytest.raises(Stopped):
        distill_correction(model, ids, fitted, steps=14, seed=3, save_to=file, on_step=end)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert file.exists() == (stop > 8)
    seen: list[int] = []
    again = distill_correction(
        model, ids, fitted, steps=14, seed=3, save_to=file, on_step=lambda done, *_: seen.append(done)
    )
    assert again == whole
    assert again.calibration == whole.calibration
    assert seen[0] == (9 if stop > 8 else 1)
    with pytest.raises(OrthoRankError, match="of another distillation: its seed is 3 and now it is 4"):
        distill_correction(model, ids, fitted, steps=14, seed=4, save_to=file)
    file.write_bytes(b"no tensors")
    with pytest.raises(OrthoRankError, match="is no record of an unfinished distillation"):
        distill_correction(model, ids, fitted, steps=14, seed=3, save_to=file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"batch_size": 9}, r"batch_size\) is 9"),
        ({"rate": 0.0}, "rate is 0.0; it must be a number above 0"),
        ({"rate": True}, "rate is True"),
        ({"plan": PLANS["mixed"]}, "the plan has no maps to distil"),
    ],
)
def test_what_is_refused(ids: Tensor, options: dict[str, Any], message: str) -> None:
    model = model_of()
    fitted = fit_correction(model, ids, PLANS["removed"], rank=4)
    with pytest.raises(OrthoRankError, match=message):
        distill_correction(model, ids, **{"plan": fitted} | options)


def test_thresholds_are_refused(ids: Tensor) -> None:
    model = model_of()
    plan = fit_correction(model, ids, calibrate(model, ids, OrthoRankConfig(layers=[2], keep_ratio=0.4)), rank=4)
    with pytest.raises(OrthoRankError, match="the plan selects by thresholds"):
        distill_correction(model, ids, plan)
