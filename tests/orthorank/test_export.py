"""A plan of removed layers as a smaller checkpoint: AutoModel computes from it what the plan computes, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply, export_pruned
from orthorank.export import layers_alike, without_layers
from tests.orthorank.hf.test_corrected import maps
from tests.orthorank.hf.test_layer import ids_of
from tests.orthorank.models import BASE, MODELS, tiny

# One for each way in which a configuration tells layers apart, and for each in which weights are saved otherwise.
DIFFERENT = ("llama-2", "mixtral", "qwen2", "qwen2-moe-step", "gemma-3", "smollm3", "cohere-2", "gpt-oss")


def exported(model: Any, layers: list[int], folder: Path) -> Any:
    """What AutoModel makes of the checkpoint; the model is as before."""
    from transformers import AutoModelForCausalLM

    modules, config = list(model.model.layers), model.config
    assert export_pruned(model, OrthoRankConfig(layers=layers, keep_ratio=0), folder) == folder
    assert list(model.model.layers) == modules
    assert model.config is config
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", [n if n in DIFFERENT else pytest.param(n, marks=pytest.mark.slow) for n in MODELS])
def test_a_checkpoint_is_the_plan(name: str, tmp_path: Path) -> None:
    model, layers, ids = tiny(name), [0, 2], ids_of(2, 24)
    with apply(model, OrthoRankConfig(layers=layers, keep_ratio=0)):
        expected = model(ids).logits
    smaller = exported(model, layers, tmp_path / "smaller")
    assert torch.equal(smaller(ids).logits, expected)
    assert smaller.config.num_hidden_layers == 2
    assert not torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_a_model_without_a_head_of_words(tmp_path: Path) -> None:
    """As `AutoModel` loads it, and a classifier."""
    from transformers import AutoModel, AutoModelForSequenceClassification, Qwen3ForSequenceClassification

    plan, ids = OrthoRankConfig(layers=[1], keep_ratio=0), ids_of(2, 24)
    whole = tiny("qwen3")
    classifier = Qwen3ForSequenceClassification(whole.config).eval()
    for loader, model in ((AutoModel, whole.model), (AutoModelForSequenceClassification, classifier)):
        with apply(model, plan):
            expected = model(ids)[0]
        folder = export_pruned(model, plan, tmp_path / loader.__name__)
        assert torch.equal(loader.from_pretrained(folder, dtype=torch.float32).eval()(ids)[0], expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "selects": ({"layers": [1, 2], "keep_ratio": 1 / 3}, r"selects tokens in layer 1, 2 \(keep_ratio 0\.3333\)"),
    "selects in one": ({"layers": [1, 2], "keep_ratio": 0, "keep_ratios": {2: 0.5}}, "selects tokens in layer 2 "),
    "corrected": ({"layers": [1, 2], "keep_ratio": 0, "correction": maps([2])}, r"is corrected \(layers 2\)"),
    "removes none": ({"layers": [1, 2], "keep_ratio": 1}, "removes no layer"),
    "removes all": ({"layers": [0, 1, 2, 3], "keep_ratio": 0}, "removes all 4 layers"),
    "of another model": ({"layers": [7], "keep_ratio": 0}, "the model has layers 0 to 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plans_that_no_checkpoint_holds(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(OrthoRankError, match=message):
        export_pruned(tiny("llama-2"), OrthoRankConfig(**fields), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_plan_of_removed_and_dense_layers(tmp_path: Path) -> None:
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=1, keep_ratios={2: 0})
    plan.save_pretrained(tmp_path / "plan")
    export_pruned(tiny("llama-2"), tmp_path / "plan", tmp_path / "out")
    assert without_layers(tiny("llama-2").config, [2]).num_hidden_layers == 3


def test_what_is_in_the_way(tmp_path: Path) -> None:
    """A plan that is applied, a checkpoint that is there, weights that are not the model's own or not here."""
    model, plan = tiny("llama-2"), OrthoRankConfig(layers=[1], keep_ratio=0)
    with apply(model, plan), pytest.raises(OrthoRankError, match="a plan is applied"):
        export_pruned(model, plan, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(OrthoRankError, match=r"has config\.json, .* does not overwrite"):
        export_pruned(model, plan, tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"
    (tmp_path / "config.json").unlink()
    for name, value, message in (("peft_config", {"default": 1}, "adapters"), ("hf_quantizer", 1, "quantised")):
        changed = tiny("llama-2")
        setattr(changed, name, value)
        with pytest.raises(OrthoRankError, match=message):
            export_pruned(changed, plan, tmp_path)
    with pytest.raises(OrthoRankError, match="offloaded"):
        export_pruned(tiny("llama-2").to("meta"), plan, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_the_model_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama-2")
    before = list(model.model.layers), model.config

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "save_pretrained", fails, raising=False)
    with pytest.raises(OrthoRankError, match="cannot be written to: No space left"):
        export_pruned(model, OrthoRankConfig(layers=[1], keep_ratio=0), tmp_path)
    assert (list(model.model.layers), model.config) == before


def test_models_whose_layers_differ() -> None:
    from transformers import CONFIG_MAPPING

    alike = {n for n, (kind, settings) in MODELS.items() if layers_alike(CONFIG_MAPPING[kind](**(BASE | settings)))}
    assert {"llama-2", "mistral", "mixtral", "qwen3-moe", "phi-3", "glm"} <= alike
    assert not alike & {"qwen2", "qwen2-moe-step", "gemma-2", "gemma-3", "olmo-3", "smollm3", "cohere-2", "gpt-oss"}


def test_what_a_configuration_says_of_each_layer() -> None:
    config = without_layers(tiny("qwen2-moe-step").config, [1])
    assert (config.mlp_only_layers, config.decoder_sparse_step) == ([0, 1, 2], 1)
    config = without_layers(tiny("gemma-3").config, [0, 3])
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert without_layers(tiny("smollm3").config, [1]).no_rope_layers == [1, 1, 0]
