"""Plans on the Hugging Face Hub: huggingface_hub's own code against a server on this machine."""

import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig, OrthoRankError, apply, status
from orthorank.common.errors import UnknownKeysWarning
from orthorank.correction import Correction
from tests.orthorank.hub_server import Hub, Repo, look_at, serving
from tests.orthorank.test_correction import correction, plan

CORRECTED = plan(correction=correction())
BARE = plan()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A server whose plans this process reads, with an empty cache."""
    with serving() as server:
        look_at(monkeypatch, server.endpoint, str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        yield server


def files_of(plan: OrthoRankConfig, folder: Path) -> dict[str, bytes]:
    """What `save_pretrained` writes, and two files that are nobody's business."""
    plan.save_pretrained(folder)
    found = {file.name: file.read_bytes() for file in folder.iterdir()}
    return found | {"modeling.py": b"raise SystemExit", "pytorch_model.bin": b"0" * 999}


def served(hub: Hub, folder: Path, plan: OrthoRankConfig = CORRECTED, ref: str = "main") -> str:
    """``plan`` as org/name; its commit."""
    return hub.repos.setdefault("org/name", Repo()).commit(files_of(plan, folder), ref)


def test_a_plan_and_its_maps_at_one_commit(hub: Hub, tmp_path: Path) -> None:
    commit = served(hub, tmp_path / "saved")
    loaded = OrthoRankConfig.from_pretrained("org/name")
    assert loaded == CORRECTED
    assert loaded.source == f"org/name@{commit}"
    assert hub.given() == [
        "/org/name/resolve/main/orthorank.json",
        f"/org/name/resolve/{commit}/correction.safetensors",
    ]
    assert "source" not in loaded.to_dict()
    assert dataclasses.replace(loaded, seed=1).source is None
    with pytest.warns(UnknownKeysWarning, match="source"):
        assert OrthoRankConfig.from_dict(BARE.to_dict() | {"source": "org/other@main"}).source is None
    assert OrthoRankConfig.from_pretrained(loaded.save_pretrained(tmp_path / "again")) == CORRECTED
    hub.asked.clear()
    assert OrthoRankConfig.from_pretrained("org/name") == CORRECTED
    assert hub.given() == []  # in the cache


@pytest.mark.parametrize("how", ["argument", "name", "commit"])
def test_another_revision(hub: Hub, tmp_path: Path, how: str) -> None:
    served(hub, tmp_path / "saved")
    commit = served(hub, tmp_path / "bare", BARE, "v2/rc")
    named = {"argument": ("org/name", "v2/rc"), "name": ("org/name@v2/rc", None), "commit": ("org/name", commit)}[how]
    loaded = OrthoRankConfig.from_pretrained(named[0], revision=named[1])
    assert loaded.layers == BARE.layers
    assert (loaded.correction, loaded.source) == (None, f"org/name@{commit}")
    assert len(hub.given()) == 1  # a plan without maps has none to fetch


def test_a_local_folder_wins(hub: Hub, tmp_path: Path) -> None:
    served(hub, tmp_path / "saved")
    BARE.save_pretrained(tmp_path / "org" / "name")
    assert OrthoRankConfig.from_pretrained("org/name") == BARE
    with pytest.warns(UserWarning, match=r"revision is 'v1' and the plan is read from org/name, a local path"):
        assert OrthoRankConfig.from_pretrained("org/name", revision="v1").source is None
    with pytest.raises(OrthoRankError, match="no plan can be read at name"):
        OrthoRankConfig.from_pretrained("./name")
    (tmp_path / "org" / "gone").symlink_to("nowhere")
    with pytest.raises(OrthoRankError, match="no plan can be read at org/gone"):
        OrthoRankConfig.from_pretrained("org/gone")
    assert hub.asked == []


def test_without_the_library(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(OrthoRankError, match=r"^org/name is no path here, and .* not installed; run: pip install"):
        OrthoRankConfig.from_pretrained("org/name")


def test_offline_the_cache_is_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = served(hub, tmp_path / "saved")
    OrthoRankConfig.from_pretrained("org/name")
    hub.asked.clear()
    look_at(monkeypatch, hub.endpoint, str(tmp_path / "cache"), offline=True)
    for revision in (None, "main", commit):
        loaded = OrthoRankConfig.from_pretrained("org/name", revision=revision)
        assert loaded == CORRECTED
        assert loaded.source == f"org/name@{commit}"
    for name in ("org/other", "org/name@v9"):
        with pytest.raises(
            OrthoRankError, match=f"^{name} on .* HF_HUB_OFFLINE is set and orthorank.json is not in the"
        ):
            OrthoRankConfig.from_pretrained(name)
    next((tmp_path / "cache").rglob("snapshots/*/correction.safetensors")).unlink()
    with pytest.raises(OrthoRankError, match=r"HF_HUB_OFFLINE is set and correction\.safetensors is not in the local"):
        OrthoRankConfig.from_pretrained("org/name")
    assert hub.asked == []


def test_what_is_not_there(hub: Hub, tmp_path: Path) -> None:
    served(hub, tmp_path / "saved")
    hub.repos["org/model"] = Repo()
    hub.repos["org/model"].commit({"config.json": b"{}"})
    hub.repos["org/gated"] = Repo(gated=True)
    for name, message in {
        "org/nothing": "there is no such repository (and no such folder here); check the name, or, if it is private",
        "org/name@v9": "it has no revision 'v9'; name a branch, a tag or a commit of it",
        "org/model": "it has no file orthorank.json; a plan is pushed with save_pretrained(folder, push_to_hub=True)",
        "org/gated": f"its authors ask for consent; give it at {hub.endpoint}/org/gated, then run `hf auth login`",
    }.items():
        with pytest.raises(OrthoRankError) as error:
            OrthoRankConfig.from_pretrained(name)
        assert str(error.value).startswith(f"{name} on the Hugging Face Hub: {message}")
    values = json.loads(hub.repos["org/name"].commits[hub.repos["org/name"].refs["main"]]["orthorank.json"])
    hub.repos["org/half"] = Repo()
    hub.repos["org/half"].commit({"orthorank.json": json.dumps(values).encode()})
    with pytest.raises(OrthoRankError, match=r"^org/half@.* it has no file correction\.safetensors"):
        OrthoRankConfig.from_pretrained("org/half")


def test_two_revisions(hub: Hub) -> None:
    with pytest.raises(OrthoRankError, match="plan is 'org/name@v1' and revision is 'v2'; name the revision in one"):
        OrthoRankConfig.from_pretrained("org/name@v1", revision="v2")
    for wrong in ("", 1):
        with pytest.raises(OrthoRankError, match=f"revision is {wrong!r}; it must be a branch, a tag or a commit"):
            OrthoRankConfig.from_pretrained("org/name", revision=wrong)  # type: ignore[arg-type]
    assert hub.asked == []


def test_what_is_too_large_is_not_downloaded(hub: Hub, tmp_path: Path) -> None:
    served(hub, tmp_path / "saved")
    repo = hub.repos["org/name"]
    large = b"{" + b" " * 2**20 + b"}"
    repo.commit({"orthorank.json": large}, "large")
    repo.refs["maps"] = repo.refs["main"]
    repo.commit({"correction.safetensors": b"0" * (2**20 + 2000)}, "maps")
    with pytest.raises(
        OrthoRankError, match=r"orthorank\.json of org/name@large has 1,048,578 bytes, and may have 1,048"
    ):
        OrthoRankConfig.from_pretrained("org/name@large")
    assert hub.given() == []
    with pytest.raises(
        OrthoRankError, match=r"correction\.safetensors of org/name@.* has 1,050,576 bytes, and may have"
    ):
        OrthoRankConfig.from_pretrained("org/name@maps")
    assert hub.given() == ["/org/name/resolve/maps/orthorank.json"]
    hub.tells_size = False
    with pytest.raises(OrthoRankError, match=r"no plan can be read at .*: it has more than 1,048,576 bytes"):
        OrthoRankConfig.from_pretrained("org/name@large")


@pytest.mark.parametrize("down", ["nobody listens", "server error"])
def test_a_hub_that_does_not_answer(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, down: str) -> None:
    served(hub, tmp_path / "saved")
    OrthoRankConfig.from_pretrained("org/name")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between huggingface_hub's five attempts
    if down == "nobody listens":
        look_at(monkeypatch, "http://127.0.0.1:9", str(tmp_path / "cache"))
    hub.fails = 503
    assert OrthoRankConfig.from_pretrained("org/name") == CORRECTED  # the cache
    with pytest.raises(
        OrthoRankError, match=r"cannot be reached and orthorank\.json is not in the local cache; check the"
    ):
        OrthoRankConfig.from_pretrained("org/other")


def test_a_file_that_is_not_the_plans(hub: Hub, tmp_path: Path) -> None:
    served(hub, tmp_path / "saved")
    other = plan(correction=correction(seed=1))
    other.save_pretrained(tmp_path / "other")
    maps = (tmp_path / "other" / "correction.safetensors").read_bytes()
    commit = hub.repos["org/name"].commit({"correction.safetensors": maps})
    with pytest.raises(OrthoRankError, match=f"^org/name@{commit}: .* they are of different plans"):
        OrthoRankConfig.from_pretrained("org/name")


def test_apply_takes_the_name_and_status_tells_the_commit(hub: Hub, tmp_path: Path, tiny_model: Any) -> None:
    model, ids = tiny_model("llama", hidden_size=8, head_dim=4), torch.arange(12)[None]
    commit = served(hub, tmp_path / "saved")
    with apply(model, CORRECTED), torch.no_grad():
        expected = model(ids).logits
        assert status(model).source == ""
    with apply(model, "org/name", revision="main") as handle, torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
        assert f"\nplan org/name@{commit}\ncorrected with maps of rank 3" in str(status(model))
        assert handle.config.source == f"org/name@{commit}"
    with apply(model, tmp_path / "saved"), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(
        OrthoRankError, match="revision is 'main'; it is of a plan on the Hub, and config is not its name"
    ):
        apply(model, CORRECTED, revision="main")
    with pytest.raises(OrthoRankError, match="config is an int; it must be an OrthoRankConfig or where one is"):
        apply(model, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["hub", "folder"])
def test_maps_of_another_model_are_not_even_fetched(
    hub: Hub, tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    served(hub, tmp_path / "saved")
    model = tiny_model("llama")
    monkeypatch.setattr(Correction, "load", lambda *given: pytest.fail("maps were read"))
    with pytest.raises(OrthoRankError, match="made for a model with hidden_size 8 and this one has 64"):
        apply(model, "org/name" if where == "hub" else "saved")
    assert not [path for path in hub.given() if "correction" in path]


def test_a_push_is_one_commit(hub: Hub, tmp_path: Path) -> None:
    login: dict[str, Any] = {"push_to_hub": True, "token": "hf_writes"}
    CORRECTED.save_pretrained(tmp_path / "name", repo_id="org/name", private=True, **login)
    repo = hub.repos["org/name"]
    assert repo.private
    assert sorted(repo.commits[repo.refs["main"]]) == ["correction.safetensors", "orthorank.json"]
    assert repo.messages == ["Upload a plan of OrthoRank"]
    with pytest.raises(OrthoRankError, match=r"there is no such repository .* if it is private, log in"):
        OrthoRankConfig.from_pretrained("org/name", token=False)
    assert OrthoRankConfig.from_pretrained("org/name", token="hf_reads") == CORRECTED
    repo.private = False

    BARE.save_pretrained(tmp_path / "name", repo_id="org/name", revision="bare", commit_message="No maps", **login)
    assert repo.messages[1:] == ["No maps"]
    assert OrthoRankConfig.from_pretrained("org/name", revision="bare") == BARE
    assert OrthoRankConfig.from_pretrained("org/name") == CORRECTED

    BARE.save_pretrained(tmp_path / "my-plan", **login)
    assert OrthoRankConfig.from_pretrained("me/my-plan") == BARE
    assert not hub.repos["me/my-plan"].private


def test_a_push_that_is_refused_leaves_the_folder(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def push(**told: Any) -> None:
        CORRECTED.save_pretrained(tmp_path / "name", push_to_hub=True, repo_id="org/name", **told)

    with pytest.raises(OrthoRankError, match=r"^org/name on .* log in"):
        push(token="hf_reads")
    assert OrthoRankConfig.from_pretrained(tmp_path / "name") == CORRECTED
    assert hub.repos == {}
    look_at(monkeypatch, hub.endpoint, str(tmp_path / "cache"), offline=True)
    with pytest.raises(OrthoRankError, match="HF_HUB_OFFLINE is set"):
        push(token="hf_writes")


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"push_to_hub": True, "organisation": "org"}, "organisation is 'org'; a push may be told repo_id, token,"),
        ({"repo_id": "org/name"}, "repo_id is of a push, and push_to_hub is False"),
        ({"maps_dtype": "float8"}, "maps_dtype is 'float8'; it may be float32, bfloat16 or float16"),
    ],
)
def test_what_a_save_is_told_wrongly(tmp_path: Path, told: dict[str, Any], message: str) -> None:
    with pytest.raises(OrthoRankError, match=message):
        CORRECTED.save_pretrained(tmp_path / "name", **told)
    assert not (tmp_path / "name").exists()


def test_a_process_of_its_own(hub: Hub, tmp_path: Path) -> None:
    """With the variables that users set, through a command."""
    commit = served(hub, tmp_path / "saved")
    code = (
        "import sys; from orthorank import OrthoRankConfig; print(OrthoRankConfig.from_pretrained(sys.argv[1]).source)"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path]),
    }
    for offline in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code, "org/name"],
            env=environment | {"HF_HUB_OFFLINE": offline},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.stdout == f"org/name@{commit}\n", done.stderr
    assert len(hub.given()) == 2


def test_a_command_takes_a_name(
    hub: Hub, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from orthorank.cli import main

    commit = served(hub, tmp_path / "saved", OrthoRankConfig(layers=[2], keep_ratio=0.5))
    text = tmp_path / "text.txt"
    text.write_text("Words and more words. " * 40)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = ["--window", "32", "--text", str(text), "--plan", f"org/name@{commit}"]
        assert main(["eval", "ppl", str(tiny_folder), *options]) == 0
        assert main(["eval", "ppl", str(tiny_folder), "--plan", "org/other"]) == 2
    assert "there is no such repository" in capsys.readouterr().err


def test_a_command_takes_a_model_s_revision(
    hub: Hub, tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is at the tag alone; what is on the main branch has no model in it."""
    from orthorank.cli import main

    files = {file.name: file.read_bytes() for file in tiny_folder.iterdir() if file.is_file()}
    repo = hub.repos.setdefault("org/model", Repo())
    repo.commit({"README.md": b"none yet"})
    repo.commit(files, ref="v2")
    text = tmp_path / "text.txt"
    text.write_text("Words and more words. " * 40)
    options = ["--window", "32", "--text", str(text), "--device", "cpu", "--json"]
    assert main(["eval", "ppl", "org/model", "--revision", "v2", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"]["name"], len(found["rows"])) == ("org/model@v2", 1)
    assert main(["eval", "ppl", "org/model", *options]) == 2
    assert "model 'org/model'" in capsys.readouterr().err
    assert main(["eval", "ppl", "org/model", "--revision", "v3", *options]) == 2
    assert "org/model@v3" in capsys.readouterr().err
