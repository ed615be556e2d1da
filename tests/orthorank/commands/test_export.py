"""`orthorank export` from end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from orthorank import OrthoRankConfig, cli

NAMES = {"config.json", "model.safetensors", "tokenizer.json"}


def test_a_folder_with_everything(tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the dtype of the checkpoint, with its tokenizer; what llama.cpp is told; a second time it is refused."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan = OrthoRankConfig(layers=[1, 3], keep_ratio=0).save_pretrained(tmp_path / "plan")
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(tiny_folder, source)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    line = ["export", str(source), "--plan", str(plan), "--output", str(out)]
    assert cli.main(line) == 0
    said = capsys.readouterr()
    assert "logits of 64 tokens equal" in " ".join(said.out.split())
    assert "llama-quantize --prune-layers 1,3 MODEL.gguf PRUNED.gguf COPY\n" in said.out
    config = json.loads((out / "config.json").read_text())
    before = json.loads((source / "config.json").read_text())
    assert config.pop("num_hidden_layers") == before.pop("num_hidden_layers") - 2
    assert {key: config[key] for key in before if key != "layer_types"} == {
        key: before[key] for key in before if key != "layer_types"
    }
    assert config["dtype"] == "bfloat16"
    assert {file.name for file in out.iterdir()} >= NAMES
    text = "the river is wide"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(source)(text)
    assert cli.main(line) == 2
    assert "does not overwrite" in capsys.readouterr().err


def test_layers_that_go_by_their_number(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp's command is not given for them; a checkpoint that computes something else is named."""
    from orthorank import export

    plan = OrthoRankConfig(layers=[1], keep_ratio=0).save_pretrained(tmp_path / "plan")
    line = ["export", str(tiny_folder), "--plan", str(plan)]
    monkeypatch.setattr(export, "layers_alike", lambda config: False)
    assert cli.main([*line, "--output", str(tmp_path / "first")]) == 0
    said = capsys.readouterr().out
    assert "Not for llama.cpp" in said
    assert "llama-quantize" not in said
    cut = export.without_layers

    def wrong(config: object, removed: list[int]) -> object:
        found = cut(config, removed)  # type: ignore[arg-type]
        found.rms_norm_eps = 0.5
        return found

    monkeypatch.setattr(export, "without_layers", wrong)
    assert cli.main([*line, "--output", str(tmp_path / "second")]) == 2
    assert "logits are not those of the model with the plan: they differ by" in capsys.readouterr().err
    assert list((tmp_path / "second").iterdir()) == [], "a checkpoint that is wrong is not kept"


def test_nothing_of_a_users_is_touched(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder or file of any name in the output stays, the model itself among them; what would be overwritten is
    refused before the model is loaded. An export that is stopped leaves nothing."""
    from safetensors import SafetensorError

    from orthorank import export

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    plan, out = OrthoRankConfig(layers=[1], keep_ratio=0).save_pretrained(tmp_path / "plan"), tmp_path / "out"
    shutil.copytree(tiny_folder, out / "part")
    (out / "notes.txt").write_text("mine")
    before = sorted(file.name for file in (out / "part").iterdir())
    line = ["export", str(out / "part"), "--plan", str(plan), "--output", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(export, "writable_folder", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(line) == 2
        patch.undo()
        patch.setattr("transformers.PreTrainedModel.save_pretrained", full)
        assert cli.main(line) == 2
        assert f"folder '{out}' cannot be written to: No space left" in capsys.readouterr().err
        patch.setattr("orthorank.models.load_model", None)
        for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
            (out / name).write_text("mine")
            assert cli.main(line) == 2
            assert f"has {name}, which an export writes and does not overwrite" in capsys.readouterr().err
            (out / name).unlink()
    assert sorted(file.name for file in out.iterdir()) == ["notes.txt", "part"]
    assert cli.main(line) == 0
    assert sorted(file.name for file in (out / "part").iterdir()) == before
    assert (out / "notes.txt").read_text() == "mine"
    assert {file.name for file in out.iterdir()} >= NAMES
    assert not list(out.glob(".orthorank-*"))


@pytest.mark.slow
def test_the_packaged_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From a GGUF file."""
    plan = OrthoRankConfig(layers=[12, 14, 15], keep_ratio=0).save_pretrained(tmp_path / "plan")
    assert cli.main(["export", "--plan", str(plan), "--output", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "27 layers, 123.9 of 134.5 million weights, float32" in " ".join(said.split())
    assert "--prune-layers 12,14,15 SmolLM2-135M-Instruct.Q4_1.gguf PRUNED.gguf COPY\n" in said
