"""`orthorank.serving.vllm.serving` and the plans that `checks` refuses: what is read, and what an error says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.serving.vllm.checks import lost_plan, needs_scheduler, plan_obstacles
from orthorank.serving.vllm.serving import OPTIONS, Serving

PLAN = {"layers": [2, 3], "keep_ratio": 0.5}


def plan_of(**fields: Any) -> OrthoRankConfig:
    return OrthoRankConfig(**(PLAN | fields))


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_read_and_written(name: str) -> None:
    for value in OPTIONS[name]:
        serving = Serving.of({"plan": PLAN, name: value})
        assert getattr(serving, name) == value
        written = serving.to_dict()
        assert set(written) == {"plan"} | ({name} if value != OPTIONS[name][0] else set())
        assert Serving.of(written) == serving


def test_the_first_of_each_is_the_default() -> None:
    serving = Serving(plan_of())
    assert {name: getattr(serving, name) for name in OPTIONS} == {name: legal[0] for name, legal in OPTIONS.items()}


def test_a_plan_is_a_mapping_or_a_file(tmp_path: Path) -> None:
    file = plan_of().save_pretrained(tmp_path)
    for value in (PLAN, {"plan": PLAN}, str(file), str(tmp_path), {"plan": str(file)}):
        assert Serving.of(value) == Serving(plan_of())


def test_what_is_written_survives_json_and_leaves_out_where_the_plan_came_from() -> None:
    plan = plan_of(
        select="threshold", thresholds={2: 0.5, 3: 0.25}, keep_ratios={3: 0.25}, calibration={"method": "by hand"}
    )
    written = Serving(plan).to_dict()
    assert written["plan"]["thresholds"] == {"2": 0.5, "3": 0.25}  # as JSON has it
    assert not {"calibration", "measured"} & set(written["plan"])
    again = Serving.of(written).plan
    assert again.thresholds == plan.thresholds
    assert again.ratios == plan.ratios


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("value", ["none", None, True, ["prompt"]])
def test_an_illegal_option(name: str, value: Any) -> None:
    with pytest.raises(OrthoRankError) as caught:
        Serving.of({"plan": PLAN, name: value})
    assert str(caught.value).startswith(f"{name} is {value!r}; it may be {OPTIONS[name][0]!r} or ")
    assert all(repr(legal) in str(caught.value) for legal in OPTIONS[name])


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, r"orthorank = None; it must be a plan or its path: pass --hf-overrides"),
        (3, r"orthorank = 3; it must be"),
        ([2, 3], r"orthorank = \[2, 3\]; it must be"),
        ({"plan": None}, r"orthorank = None; it must be"),
        ({"plan": PLAN, "resue": "all"}, r"the key 'resue'; beside the plan it may have \['threshold_count', 'reuse'"),
        ({}, "no key 'layers'"),
        (PLAN | {"keep_ratoi": 0.5}, "keep_ratoi.*A server ignores none: correct.*known are layers, keep_ratio"),
        ({"plan": PLAN | {"selcet": "window"}}, "selcet"),
        ({"plan": PLAN | {"keep_ratio": 1.5}}, "keep_ratio"),
        ("nowhere.json", r"no plan can be read at nowhere\.json"),
    ],
)
def test_what_is_no_plan(value: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        Serving.of(value)


def test_a_typo_in_a_file_is_refused_too(tmp_path: Path) -> None:
    file = plan_of().save_pretrained(tmp_path)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"keep_lats": 4}))
    with pytest.raises(OrthoRankError, match="keep_lats"):
        Serving.of(str(file))


@pytest.mark.parametrize("kept_as", ["mapping", "file"])
def test_a_plan_of_a_newer_version_is_warned_of_as_elsewhere(tmp_path: Path, kept_as: str) -> None:
    """Its keys are known: it is followed, as on Hugging Face's models, and nothing is said of keys."""
    values = plan_of().to_dict() | {"version": "99.0"}
    file = tmp_path / "orthorank.json"
    file.write_text(json.dumps(values))
    with pytest.warns(UserWarning, match=r"written by version 99\.0, and this is") as caught:
        found = Serving.of(values if kept_as == "mapping" else str(file))
    assert found.plan.layers == [2, 3]
    assert not any("take them out" in str(each.message) for each in caught)
    with pytest.raises(OrthoRankError, match=r"version 99\.0\) has keys .*colour.*A server ignores none"):
        Serving.of(values | {"colour": 1})


@pytest.mark.filterwarnings("ignore:this plan names no layers")
@pytest.mark.parametrize("kept_as", ["mapping", "file"])
def test_a_plan_without_layers_is_refused_as_such(tmp_path: Path, kept_as: str) -> None:
    values = plan_of().to_dict() | {"layers": []}
    file = tmp_path / "orthorank.json"
    file.write_text(json.dumps(values))
    serving = Serving.of(values if kept_as == "mapping" else str(file))
    assert list(plan_obstacles(serving)) == ["the plan has no layers; serve the model without it"]


def model(model_type: str, architecture: str) -> SimpleNamespace:
    return SimpleNamespace(architecture=architecture, hf_config=SimpleNamespace(model_type=model_type))


def test_a_plan_beside_a_dense_architecture() -> None:
    assert list(lost_plan(model("llama", "OrthoRankLlamaForCausalLM"))) == []
    (said,) = lost_plan(model("qwen2", "Qwen2ForCausalLM"))
    assert "'Qwen2ForCausalLM', which would be served dense" in said
    assert "set architectures to ['OrthoRankQwen2ForCausalLM']: pass --hf-overrides" in said
    (said,) = lost_plan(model("gemma3_text", "Gemma3ForCausalLM"))
    assert "model_type is 'gemma3_text', and OrthoRank serves llama, mistral, qwen2, qwen3; take the plan out" in said


THRESHOLD: dict[str, Any] = {"select": "threshold", "thresholds": {2: 0.5, 3: 0.25}}
REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({}, []),
    ({"criterion": "cosine"}, []),
    ({"criterion": "inverse", "sink_layer": 1}, []),
    ({"keep_ratios": {2: 0}, "sink_layer": 2}, []),  # a removed layer may stand before the sink
    ({"layers": [0, 3], "keep_ratios": {0: 0}}, []),
    (THRESHOLD, []),
    ({"layers": []}, ["no layers"]),
    ({"criterion": "random"}, ["criterion is 'random'", "'orthogonal', 'inverse', 'cosine'"]),
    ({"criterion": "prenorm"}, ["criterion is 'prenorm'"]),
    ({"kv": "selected"}, ["kv is 'selected'", "set kv to 'all'"]),
    ({"update_sink": True}, ["update_sink is True", "set it to False"]),
    ({"sinks": "auto"}, ["sinks is 'auto'", "set it to 'first'"]),
    (THRESHOLD | {"decode": "threshold"}, ["decode is 'threshold'", "set it to 'dense'"]),
    ({"layers": [0, 2]}, ["layer 0 selects", "take it out"]),
    ({"sink_layer": 2}, ["layer 2 selects", "the sink forms in layer 2"]),
    ({"sink_layer": 5}, ["layer 2 selects", "the sink forms in layer 5"]),
]


@pytest.mark.parametrize(("fields", "words"), REFUSED, ids=lambda value: str(value)[:40])
def test_plans_that_are_refused(fields: dict[str, Any], words: list[str]) -> None:
    found = list(plan_obstacles(Serving(plan_of(**fields))))
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)


def test_every_reason_is_given() -> None:
    plan = plan_of(kv="selected", update_sink=True, layers=[0, 2], sink_layer=0)
    words = ["kv is", "update_sink is", "layer 0 selects, and no sink", "layer 0 selects, and the sink"]
    found = list(plan_obstacles(Serving(plan)))
    assert len(found) == len(words)
    assert all(start in sentence for start, sentence in zip(words, found, strict=True))


@pytest.mark.parametrize(
    ("fields", "reuse", "caching", "needed"),
    [
        ({}, "prompt", True, False),
        ({"select": "window", "select_window": 8}, "all", False, True),
        ({"select": "window", "select_window": 8}, "prompt", True, True),
        (THRESHOLD, "prompt", True, True),
        (THRESHOLD, "prompt", False, False),
        (THRESHOLD, "all", True, False),
    ],
)
def test_which_plans_need_the_scheduler(fields: dict[str, Any], reuse: str, caching: bool, needed: bool) -> None:
    assert needs_scheduler(Serving(plan_of(**fields), reuse=reuse), caching) is needed
