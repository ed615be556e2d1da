"""The plan of a handle is to be read; and what a measurement compiles it takes back."""

from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.speed.prefill_ways import compiled_layers
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import tiny


@torch.no_grad()
@pytest.mark.parametrize(
    ("field", "value"), [("keep_last", 3), ("thresholds", {1: 9.0, 2: 0.5}), ("keep_ratio", 0.9), ("layers", [1])]
)
def test_a_plan_that_was_changed_after_it_was_applied(field: str, value: Any) -> None:
    model, ids = tiny("llama-3"), ids_of(1, 12)
    plan = OrthoRankConfig(layers=[1, 2], select="threshold", thresholds={1: 0.5, 2: 0.5})
    with apply(model, plan) as handle:
        before, expected = getattr(handle.config, field), model(ids).logits
        if field == "thresholds":
            handle.config.thresholds.update(value)  # in place
            before = {1: 0.5, 2: 0.5}
        else:
            setattr(handle.config, field, value)
        with pytest.raises(OrthoRankError, match=rf"handle.config.{field} is .*call handle.remove\(\), then apply"):
            model(ids)
        setattr(handle.config, field, before)
        assert torch.equal(model(ids).logits, expected)


def test_layers_that_the_caller_compiled_stay_compiled() -> None:
    model = tiny("llama-3")
    model.model.layers[1].compile(backend="eager")
    before = [layer._compiled_call_impl for layer in model.model.layers]
    with compiled_layers(model, backend="eager"):
        assert all(layer._compiled_call_impl is not None for layer in model.model.layers)
    assert all(layer._compiled_call_impl is was for layer, was in zip(model.model.layers, before, strict=True))
