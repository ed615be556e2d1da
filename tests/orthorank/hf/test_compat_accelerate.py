"""Models that accelerate spreads over devices and disk: same logits, same tokens, and plans that come off again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from orthorank import OrthoRankConfig, OrthoRankError, apply
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import MODELS, tiny

accelerate = pytest.importorskip("accelerate")
PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=1 / 3)
REMOVED = OrthoRankConfig(layers=[1, 2], keep_ratio=0)
CORRECTED = OrthoRankConfig(layers=[1, 2], keep_ratios={1: 1 / 3, 2: 0}, correction=maps([1, 2]))
GREEDY: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def batch() -> tuple[Tensor, Tensor]:
    """Two rows, the first with padding on the left."""
    ids, mask = ids_of(2, 16), torch.ones(2, 16, dtype=torch.long)
    mask[0, :4] = 0
    return ids * mask, mask


@torch.no_grad()
def results(model: Any, plan: OrthoRankConfig = PLAN) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Logits and generated tokens under the plan, and how many tokens its layers updated."""
    ids, mask = batch()
    with apply(model, plan) as handle:
        logits = model(ids, attention_mask=mask).logits[mask.bool()]
        tokens = model.generate(ids, attention_mask=mask, **GREEDY)
        return logits, tokens, {layer: counts.tokens_updated for layer, counts in handle.stats.items()}


def offloaded(name: str, folder: Path, place: str) -> Any:
    """The model called ``name``, saved and loaded again with some of its layers elsewhere until they run."""
    model = tiny(name)
    if place == "cpu":  # weights stay on the CPU, and are put where they run: the CPU, too, on a machine without a GPU
        accelerate.cpu_offload(model, torch.device("cpu"))
        return model
    model.save_pretrained(folder / "saved")
    layers = {f"model.layers.{i}": "disk" if i in (1, 3) else "cpu" for i in range(4)}
    places = {key: "cpu" for key, _ in model.named_children() if key != "model"}
    places |= {f"model.{key}": "cpu" for key, _ in model.model.named_children() if key != "layers"} | layers
    return AutoModelForCausalLM.from_pretrained(
        folder / "saved", device_map=places, offload_folder=folder / "weights", dtype=torch.float32
    ).eval()


def check(name: str, folder: Path, place: str) -> None:
    """Everything as on one device, with weights that lie elsewhere before and after."""
    whole, model = tiny(name), offloaded(name, folder, place)
    weight = model.model.layers[1].self_attn.o_proj
    assert weight.weight.device.type == "meta", "the layer is not offloaded, and this tests nothing"
    for plan in (PLAN, REMOVED, CORRECTED):
        for actual, expected in zip(results(model, plan), results(whole, plan), strict=True):
            assert torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected
    assert weight.weight.device.type == "meta"
    ids, mask = batch()
    with torch.no_grad():
        dense, expected = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, whole))
    assert torch.equal(dense, expected), "the plan did not come off"


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_layers_that_are_elsewhere_until_they_run(place: str, tmp_path: Path) -> None:
    check("llama-3", tmp_path, place)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["cpu", "disk"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_offloaded_layers_of_every_family(name: str, place: str, tmp_path: Path) -> None:
    check(name, tmp_path, place)


def test_a_device_map_that_accelerate_chooses(tmp_path: Path) -> None:
    """``device_map="auto"`` on too little memory: what does not fit goes to disk, selected layers among it."""
    whole = tiny("llama-3")
    whole.save_pretrained(tmp_path / "saved")
    size = sum(weight.numel() * weight.element_size() for weight in whole.parameters())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved",
        device_map="auto",
        max_memory={"cpu": int(size * 0.6)},
        offload_folder=tmp_path / "weights",
        dtype=torch.float32,
    ).eval()
    assert {"cpu", "disk"} == {str(place) for place in model.hf_device_map.values()}, model.hf_device_map
    for plan in (PLAN, CORRECTED):
        for actual, expected in zip(results(model, plan), results(whole, plan), strict=True):
            assert torch.equal(actual, expected) if isinstance(actual, Tensor) else actual == expected


@pytest.mark.parametrize("plan", [PLAN, CORRECTED], ids=["plain", "corrected"])
@torch.no_grad()
def test_hooks_that_come_after_the_plan(plan: OrthoRankConfig) -> None:
    """The plan goes on, and comes off; a hook around a patched layer's forward has to come off first."""
    whole, model = tiny("llama-3"), tiny("llama-3")
    ids, mask = batch()
    with apply(whole, plan):
        expected = whole(ids, attention_mask=mask).logits
    handle = apply(model, plan)
    accelerate.cpu_offload(model, torch.device("cpu"))
    accelerate.hooks.add_hook_to_module(model.model.layers[1], accelerate.hooks.ModelHook())
    assert torch.equal(model(ids, attention_mask=mask).logits, expected)
    with pytest.raises(OrthoRankError, match="was replaced again after the plan was applied; undo that replacement"):
        handle.remove()
    accelerate.hooks.remove_hook_from_module(model.model.layers[1])
    handle.remove()
    assert torch.equal(model(ids, attention_mask=mask).logits, whole(ids, attention_mask=mask).logits)
