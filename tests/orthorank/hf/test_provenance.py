"""What a corrected plan knows of the weights that it was fitted on, and when `apply` says that others are here."""

import copy
import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, apply, fit_correction
from orthorank.hf.provenance import SAMPLED, active_adapters, differing, license_of, weights_fingerprint
from tests.orthorank.hf.test_compat_adapters import adapted
from tests.orthorank.models import tiny

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratio=0.5, keep_ratios={2: 0.0})
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def ids_of(windows: int = 6) -> Tensor:
    return torch.randint(3, 128, (windows, 24), generator=torch.Generator().manual_seed(0))


def fitted(model: Any) -> OrthoRankConfig:
    return fit_correction(model, ids_of(), PLAN, rank=4)


def said(model: Any, plan: OrthoRankConfig) -> list[str]:
    """What `apply` warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        apply(model, plan).remove()
    return [str(each.message) for each in found]


@pytest.mark.parametrize("name", ["llama-3", "gemma-2", "qwen3-moe"])
def test_a_model_is_itself_in_any_dtype(name: str) -> None:
    prints = [weights_fingerprint(tiny(name).to(dtype)) for dtype in DTYPES]
    for one in prints:
        for other in prints:
            assert differing(one, other) == (0, SAMPLED)


def test_the_real_model_is_itself_in_any_dtype(smollm2: tuple[Any, Any]) -> None:
    model, _ = smollm2
    here = weights_fingerprint(model)
    for dtype in (torch.bfloat16, torch.float16):
        assert differing(here, weights_fingerprint(copy.deepcopy(model).to(dtype))) == (0, SAMPLED)


def trained(model: Any, kind: str, share: float) -> Any:
    """``model`` with the weights of a kind changed by some share of their size, as a fine-tune does."""
    torch.manual_seed(1)
    for key, weight in model.named_parameters():
        if kind in key and weight.dim() > 1:
            weight.data += share * weight.data.std() * torch.randn_like(weight)
    return model


@pytest.mark.parametrize(("kind", "share"), [("", 3e-3), ("q_proj", 0.1), ("layers.2.", 0.1), ("v_proj", 0.03)])
def test_a_fine_tune_warns_and_is_followed(kind: str, share: float) -> None:
    plan = fitted(tiny("llama-3"))
    assert said(tiny("llama-3"), plan) == said(tiny("llama-3").half(), plan) == []
    other = trained(tiny("llama-3"), kind, share)
    (warning,) = said(other, plan)
    assert "the plan's maps were fitted on other weights, of another fine-tune or rounded otherwise perhaps:" in warning
    assert f"of {SAMPLED} that were compared differ; what they put back may be wrong" in warning
    assert said(other, dataclasses.replace(plan, correction=None)) == []
    assert said(other, fitted(other)) == []


def test_a_plan_of_an_earlier_version_is_not_compared(tmp_path: Path) -> None:
    plan = fitted(tiny("llama-3"))
    other = trained(tiny("llama-3"), "", 0.1)
    for early in ("0123456789abcdef", None, 3, "bf16:" + "x" * 4 * SAMPLED, "bf16:3f80"):
        plan.calibration["correction"]["model_fingerprint"] = early
        plan.save_pretrained(tmp_path)
        assert said(other, OrthoRankConfig.from_pretrained(tmp_path)) == []
    plan.calibration["correction"] = "by hand"
    assert said(other, plan) == []
    assert said(other, dataclasses.replace(plan, calibration={})) == []


def test_weights_that_cannot_be_read_are_not_compared() -> None:
    """Quantised and offloaded ones; what can be read still tells another model."""
    quantise, accelerate = pytest.importorskip("torchao.quantization"), pytest.importorskip("accelerate")
    plan, models = fitted(tiny("llama-3")), [tiny("llama-3"), trained(tiny("llama-3"), "", 0.1), tiny("llama-3")]
    quantise.quantize_(models[0], quantise.Int8WeightOnlyConfig())
    assert said(models[0], plan) == []
    found = differing(plan.calibration["correction"]["model_fingerprint"], weights_fingerprint(models[0]))
    assert found is not None
    assert found == (0, SAMPLED * 9 / 16)  # norms and biases
    accelerate.cpu_offload(models[2].model.layers[3], torch.device("cpu"))
    found = differing(weights_fingerprint(models[1]), weights_fingerprint(models[2]))
    assert found is not None
    assert 0 < found[0] <= found[1] == SAMPLED * 3 / 4
    assert said(models[2], plan) == []
    for weight in models[1].parameters():
        weight.data = torch.empty(0)  # as in a process that holds a part of the model
    assert differing(weights_fingerprint(models[1]), weights_fingerprint(tiny("llama-3"))) == (0, 0)


@torch.no_grad()
def test_adapters_are_recorded_and_missed() -> None:
    """Active when the maps were fitted, or not: `apply` says what has changed. The base's weights are the same."""
    ids = ids_of(1)
    bare, wrapped = tiny("llama-3"), adapted(tiny("llama-3"), "llama-3")
    plans = fitted(bare), fitted(wrapped)
    assert [plan.calibration["correction"]["adapters"] for plan in plans] == [[], ["default"]]
    assert not torch.equal(plans[0].correction.maps[1].down, plans[1].correction.maps[1].down)
    assert said(bare, plans[0]) == said(wrapped, plans[1]) == []
    for model, plan, words in (
        (bare, plans[1], "fitted with the adapters default, and active here are none"),
        (wrapped, plans[0], "fitted with the adapters none, and active here are default"),
    ):
        (warning,) = said(model, plan)
        assert words in warning
    with wrapped.disable_adapter():
        assert active_adapters(wrapped) == []
        assert said(wrapped, plans[0]) == []
    wrapped.merge_adapter()
    assert said(wrapped, plans[1]) == []
    with apply(wrapped, plans[1]):
        merged = wrapped(ids).logits
    wrapped.unmerge_adapter()
    with apply(wrapped, plans[1]):
        assert (wrapped(ids).logits - merged).abs().max() < 1e-3 * merged.abs().max()
    (warning,) = said(wrapped.merge_and_unload(), plans[0])
    assert "fitted on other weights" in warning


CARD = "---\nlicense: apache-2.0\n---\n# A model\n"


@pytest.mark.parametrize(
    ("card", "wanted"),
    [
        (CARD, "apache-2.0"),
        ("---\nlicense: other\nlicense_name: a-licence\n---\n", "a-licence"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {\n---\n", None),
        ("# A model\n", None),
        (None, None),
    ],
)
def test_the_licence_in_a_models_folder(tmp_path: Path, card: str | None, wanted: str | None) -> None:
    from transformers import AutoModelForCausalLM

    tiny("llama-2").save_pretrained(tmp_path)
    (tmp_path / "README.md").unlink(missing_ok=True)
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert license_of(model) == wanted
    assert fitted(model).calibration["correction"]["model_license"] == wanted


def test_the_licence_in_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the commit that was loaded; nothing is asked of the Hub."""
    commit, cache = "a" * 40, tmp_path / "models--org--name"
    (cache / "snapshots" / commit).mkdir(parents=True)
    (cache / "snapshots" / commit / "README.md").write_text(CARD)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = tiny("llama-2")
    assert license_of(model) is None
    model.config._name_or_path, model.config._commit_hash = "org/name", commit
    assert license_of(model) == "apache-2.0"
    model.config._commit_hash = "b" * 40
    assert license_of(model) is None
    model.config.license = "mit"
    assert license_of(model) == "mit"
