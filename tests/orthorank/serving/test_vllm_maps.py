"""How the maps of a corrected plan come to vLLM's workers, and what a removed layer does with its own."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.cli import main
from orthorank.correction import FILE_NAME
from orthorank.packed import map_of
from orthorank.serving.vllm import maps
from orthorank.serving.vllm.checks import model_obstacles, plan_obstacles
from orthorank.serving.vllm.removed import CorrectedRemovedLayer, make_removed
from orthorank.serving.vllm.serving import Serving
from tests.orthorank.hf.test_corrected import maps as random_maps
from tests.orthorank.hub_server import Repo, look_at, serving
from tests.orthorank.models import tiny
from tests.orthorank.statement import assert_close

PLAN = OrthoRankConfig(layers=[1, 2], keep_ratios={1: 0.0}, model_type="llama", correction=random_maps([1, 2]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plan's, beneath the working folder."""
    monkeypatch.chdir(tmp_path)
    return PLAN.save_pretrained(tmp_path / "plans" / "mine").parent


def told(folder: str | Path) -> dict[str, Any]:
    """What stands in the model's configuration, by way of JSON."""
    serving = Serving(OrthoRankConfig.from_pretrained(folder))
    assert not list(plan_obstacles(serving))
    return json.loads(json.dumps(serving.to_dict()))


@pytest.mark.parametrize("path", ["plans/mine", "./plans/mine/orthorank.json"])
def test_a_folder_by_its_absolute_path(folder: Path, capsys: pytest.CaptureFixture[str], path: str) -> None:
    assert main(["vllm-args", path, "--python"]) == 0
    found = json.loads(capsys.readouterr().out)["hf_overrides"]["orthorank"]
    assert found == told(path)
    assert PLAN.correction is not None
    assert found["plan"]["correction"] == PLAN.correction.to_dict() | {"maps": str(folder)}
    assert Serving.of(found) == Serving.of(found["plan"]) == Serving.of(str(folder)) == Serving(PLAN)
    assert Serving.of(found).to_dict() == found


def test_a_repository_of_the_hub_at_its_commit(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    with serving() as hub:
        look_at(monkeypatch, hub.endpoint, str(tmp_path / "cache"))
        commit = hub.repos.setdefault("org/name", Repo()).commit(files)
        found = told("org/name")
        assert found["plan"]["correction"]["maps"] == f"org/name@{commit}"
        hub.asked.clear()
        look_at(monkeypatch, hub.endpoint, str(tmp_path / "another machine"))
        assert Serving.of(found) == Serving(PLAN)
        assert hub.given() == [f"/org/name/resolve/{commit}/{FILE_NAME}"]
        assert Serving.of(found).to_dict() == found
        found["plan"]["correction"]["maps"] = "org/name@v3"
        with pytest.raises(OrthoRankError, match="it has no revision 'v3'"):
            Serving.of(found)


@pytest.mark.parametrize(
    ("where", "shown"), [(None, "None"), ("plans/mine", "'plans/mine'"), ("~/mine", "'~/mine'"), (3, "3")]
)
def test_where_the_maps_are_must_be_said_in_full(folder: Path, where: Any, shown: str) -> None:
    """By a path that is the same from every working folder, or by a revision."""
    found = told(folder)
    found["plan"]["correction"]["maps"] = where
    with pytest.raises(
        OrthoRankError, match=r"correction\['maps'\] is .*the absolute path of the plan's folder, or"
    ) as e:
        Serving.of(found)
    assert f"is {shown}; it must" in str(e.value)


def test_maps_that_are_not_there_or_others(folder: Path) -> None:
    found = told(folder)
    dataclasses.replace(PLAN, correction=random_maps([1, 2], seed=1)).save_pretrained(folder)
    with pytest.raises(
        OrthoRankError, match=r"holds maps with the hash .* the plan was saved with .*each node needs the"
    ):
        Serving.of(found)
    (folder / FILE_NAME).unlink()
    with pytest.raises(OrthoRankError, match=r"correction\.safetensors, which is not there.*each node needs the one"):
        Serving.of(found)
    found["plan"]["correction"]["layers"] = [1, 3]
    with pytest.raises(OrthoRankError, match="correction has a map for layer 3, which leaves no token out"):
        Serving.of(found)


def test_maps_in_memory_alone() -> None:
    with pytest.raises(OrthoRankError, match=r"maps are in memory alone.*from_pretrained\(folder\)"):
        Serving(PLAN).to_dict()


def test_maps_of_another_hidden_size() -> None:
    config = SimpleNamespace(model_type="llama", num_hidden_layers=4, hidden_size=128)
    assert list(model_obstacles(Serving(PLAN), config)) == [
        "the plan's correction has maps of hidden size 64, and the model's is 128: it was fitted on another model; fit "
        "one on this model with orthorank.fit_correction"
    ]


class Norm(nn.Module):
    """Of vLLM: alone, or of a sum, which it gives, too."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon, self.norm = norm.weight, norm.variance_epsilon, norm

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return self.norm(x) if residual is None else (self.norm(x + residual), x + residual)

    forward = forward_native


class Decoder(nn.Module):
    """As much of a decoder layer of vLLM as there is of a removed one."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(layer.input_layernorm), nn.Identity()
        self.mlp, self.self_attn = nn.Identity(), nn.Identity()
        self.self_attn.attn = SimpleNamespace(layer_name="here")  # type: ignore[assignment]


@pytest.mark.parametrize("first", [True, False], ids=["the first layer", "a later one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_removed_layer_is_that_of_hugging_face(dtype: torch.dtype, first: bool) -> None:
    """To the bit of a prompt; then a token behind it, beside the sink of another request."""
    model, seen = tiny("llama-2").to(dtype), dict[str, Tensor]()
    plan, draw = OrthoRankConfig(layers=[1], keep_ratio=0, correction=random_maps([1])), torch.manual_seed(0)
    decoder, contexts = Decoder(model.model.layers[1]), {"here": 0}
    make_removed(decoder, contexts, corrected=True)
    assert contexts == {}
    layer_map = map_of(plan, 1, torch.device("cpu"), dtype)
    assert layer_map is not None
    maps.hold(decoder, layer_map)
    assert [part.dtype for part in maps.held(decoder) or ()] == [dtype] * 3
    assert not [name for name in decoder.state_dict() if "orthorank" in name]  # no checkpoint has them
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.update(new=output, old=args[0]))
    with apply(model, plan) as handle, handle.prefilling(), torch.no_grad():
        model(torch.randint(3, 128, (1, 9), generator=draw))
    old, new = seen["old"][0], seen["new"][0]
    residual = None if first else torch.zeros_like(old)
    with torch.no_grad():
        hidden, stream = CorrectedRemovedLayer.forward(decoder, torch.arange(9), old.clone(), residual)
        again = CorrectedRemovedLayer.forward(decoder, torch.tensor([4, 0]), old[[4, 0]], None)[1]
    assert torch.equal(stream, new)
    assert_close(again, new[[4, 0]], 1e-5 if dtype == torch.float32 else 0.1)
    assert torch.equal(stream[0], old[0])
    assert not torch.equal(stream[1], old[1])
    assert not hidden.any()
