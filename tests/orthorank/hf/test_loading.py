"""One loader: a checkpoint that lacks a tensor, has it in another shape or has more of them is refused by its name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.cli import main
from orthorank.models import load_model

Tensors = dict[str, torch.Tensor]
MLP = "model.layers.3.mlp"


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def checkpoint(source: Path, folder: Path, change: Callable[[Tensors], Tensors], **config: Any) -> str:
    """A copy of the checkpoint ``source`` with other tensors and other fields of its configuration."""
    shutil.copytree(source, folder)
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(change(tensors), file, metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    return str(folder)


CASES: dict[str, tuple[Callable[[Tensors], Tensors], dict[str, Any], str]] = {
    "a layer's MLP": (
        without(MLP),
        {},
        rf"in no file of the checkpoint and would be random: {MLP}.down_proj.weight, {MLP}.gate_proj.weight, "
        rf"{MLP}.up_proj.weight; the files are incomplete",
    ),
    "a norm": (without("layers.2.input_layernorm"), {}, "would be random: model.layers.2.input_layernorm.weight;"),
    "the head": (without("lm_head"), {}, "would be random: lm_head.weight;"),
    "the embedding": (without("embed_tokens"), {}, "would be random: model.embed_tokens.weight;"),
    "more layers than files": (lambda t: t, {"num_hidden_layers": 7}, r"model.layers.6.input_layernorm.*and 1 more;"),
    "fewer layers than files": (
        lambda t: t,
        {"num_hidden_layers": 4},
        r"tensors that the model's layers have no place for.*: model.layers.4.input_layernorm.weight.* and 10 more;",
    ),
    "a bias that the model has not": (
        lambda t: t | {"model.layers.1.self_attn.q_proj.bias": torch.ones(64)},
        {},
        "no place for.*: model.layers.1.self_attn.q_proj.bias;",
    ),
    "another shape": (
        lambda t: t | {f"{MLP}.up_proj.weight": torch.ones(7, 64)},
        {},
        rf"another shape than config.json says: {MLP}.up_proj.weight \(7 x 64 in the file, 128 x 64 in the model\);",
    ),
    "another width": (
        lambda t: t,
        {"intermediate_size": 96},
        r"another shape.*down_proj.weight \(64 x 128 in the file",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_not_the_models_checkpoint(tiny_folder: Path, tmp_path: Path, case: str) -> None:
    change, config, words = CASES[case]
    with pytest.raises(OrthoRankError, match=words):
        load_model(checkpoint(tiny_folder, tmp_path / "model", change, **config), device="cpu")


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda t: t, {}),
        (without("lm_head"), {"tie_word_embeddings": True}),  # one tensor is both
        (lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, {}),  # of an old transformers
        (lambda t: t | {"vision_tower.layers.0.mlp.weight": torch.ones(8)}, {}),  # another part of a larger model
    ],
)
def test_whole_checkpoints_load(tiny_folder: Path, tmp_path: Path, change: Any, config: dict[str, Any]) -> None:
    model, _, info = load_model(checkpoint(tiny_folder, tmp_path / "model", change, **config), device="cpu")
    assert info.num_hidden_layers == 6
    assert all(torch.isfinite(weight).all() for weight in model.parameters())


def test_every_command_refuses_it(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = checkpoint(tiny_folder, tmp_path / "model", without(MLP))
    plan = str(OrthoRankConfig(layers=[2, 3]).save_pretrained(tmp_path))
    (tmp_path / "q.jsonl").write_text(json.dumps({"task": "qasper", "prompt": "a", "gold": ["b"]}))
    commands = [
        ["doctor", folder],
        ["search", folder],
        ["calibrate", folder, "--plan", plan],
        ["analyze", folder],
        ["bench", folder, "--plan", plan],
        ["demo", "--model", folder],
        ["eval", "ppl", folder],
        ["eval", "tasks", folder, "--tasks", "piqa"],
        ["eval", "longbench", folder, "--data", "q.jsonl"],
        ["reproduce", folder, "--calibration", plan, "--text", f"a={plan}", "--longbench", "none", "--tasks", "none"],
    ]
    for command in commands:
        assert main(command) == 2, command
        assert f"would be random: {MLP}.down_proj.weight" in capsys.readouterr().err, command


def test_a_checkpoint_in_shards_one_of_which_lacks_a_tensor(tiny_model: Any, tiny_folder: Path, tmp_path: Path) -> None:
    """The index names it, and the file does not have it."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tiny_model("llama", vocab_size=256, num_hidden_layers=6).save_pretrained(folder, max_shard_size="300KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    load_model(str(folder), device="cpu")
    shard = next(shard for shard in shards if any(MLP in name for name in load_file(shard)))
    save_file(without(MLP)({n: t.clone() for n, t in load_file(shard).items()}), shard, metadata={"format": "pt"})
    with pytest.raises(OrthoRankError, match=rf"{MLP}\.\w+.weight"):
        load_model(str(folder), device="cpu")


def test_a_file_that_was_cut_short(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(OrthoRankError, match="cannot be loaded"):
        load_model(str(folder), device="cpu")


def test_the_harness_loads_by_the_same_rule(tiny_folder: Path, tmp_path: Path) -> None:
    """`orthorank lm-eval --model orthorank` loads a checkpoint by the harness's own code."""
    from orthorank.evaluation.tasks import OrthoRankLM

    folder = checkpoint(tiny_folder, tmp_path / "model", without(MLP))
    with pytest.raises(OrthoRankError, match=rf"would be random: {MLP}.down_proj.weight"):
        OrthoRankLM(folder, device="cpu", prefix_token_id=0)
