"""The plan file: what it holds, what it refuses, what it survives."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankConfig, OrthoRankError


def test_round_trip(tmp_path: Path) -> None:
    plan = OrthoRankConfig(
        layers=[14, 12],
        keep_ratio=1 / 3,
        keep_last=2,
        keep_multiple=64,
        model_id="a/b",
        model_type="llama",
        num_hidden_layers=30,
        hidden_size=576,
        sink_layer=11,
        calibration={"tokens": 512},
        measured={"perplexity": 20.5},
    )
    path = plan.save_pretrained(tmp_path / "new" / "folder")
    assert OrthoRankConfig.from_pretrained(path) == plan
    assert OrthoRankConfig.from_pretrained(path.parent) == plan
    assert plan.keep_ratio == 1 / 3, "JSON keeps every bit"
    text = path.read_text()
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert list(path.parent.iterdir()) == [path], "no part file stays behind"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layers": "12"}, "layers is '12'; it must be a list of layer numbers"),
        ({"layers": [1.0]}, r"layers is \[1.0\]"),
        ({"layers": [True]}, r"layers is \[True\]"),
        ({"layers": [-1]}, "layers holds -1; layers are counted from 0"),
        ({"layers": [3, 3]}, "a layer is listed twice"),
        ({"layers": [30], "num_hidden_layers": 30}, "layers holds 30; the model has layers 0 to 29"),
        ({"keep_ratio": 1.01}, "keep_ratio is 1.01; it must be from 0"),
        ({"keep_ratio": -0.1}, "keep_ratio is -0.1"),
        ({"keep_ratio": math.nan}, "keep_ratio is nan"),
        ({"keep_ratio": "1/3"}, "keep_ratio is '1/3'; it must be a number"),
        ({"keep_ratio": True}, "keep_ratio is True"),
        ({"keep_last": -1}, "keep_last is -1; it must be an integer, 0 or more"),
        ({"keep_last": 1.5}, "keep_last is 1.5"),
        ({"keep_multiple": 0}, "keep_multiple is 0; it must be an integer, 1 or more"),
        ({"keep_multiple": 64, "select": "window", "select_window": 256}, "keep_multiple is 64 and select is 'window'"),
        ({"criterion": "random walk"}, "criterion is 'random walk'; it may be 'orthogonal' or 'inverse'"),
        ({"select": "window?"}, "select is 'window.*it may be 'topk'"),
        ({"kv": "some"}, "kv is 'some'; it may be 'all'"),
        ({"decode": "sparse"}, "decode is 'sparse'; it may be 'dense'"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be an integer, 1 or more"),
        ({"num_hidden_layers": "30"}, "num_hidden_layers is '30'"),
        ({"sink_layer": -2}, "sink_layer is -2"),
        ({"model_id": 7}, "model_id is 7; it must be a string"),
        ({"version": None}, "version is None; it must be a string"),
        ({"calibration": []}, r"calibration is \[\]; it must be a mapping"),
        ({"seed": -1}, "seed is -1; it must be an integer, 0 or more"),
        ({"update_sink": 1}, "update_sink is 1; it must be True or False"),
        ({"sinks": "all"}, "sinks is 'all'; it may be 'first' or 'auto'"),
        ({"keep_ratios": [0.5]}, r"keep_ratios is \[0.5\]; it must be a mapping from layer numbers"),
        ({"keep_ratios": {2: 0.5}}, r"keep_ratios has the key 2; its keys must be among the plan's layers, \[1\]"),
        ({"keep_ratios": {"one": 0.5}}, "keep_ratios has the key 'one'"),
        ({"keep_ratios": {1: 0.5, "1": 0.4}}, "keep_ratios has the key 1 twice"),
        ({"keep_ratios": {1: 2}}, r"keep_ratios\[1\] is 2; it must be from 0"),
        ({"select": "window"}, "select_window is None; give the tokens of a window"),
        ({"select": "window", "select_window": 0}, "select_window is 0; it must be an integer, 1 or more"),
        ({"select_window": 64}, "select_window is 64 and select is 'topk'"),
        ({"select": "threshold"}, "thresholds has none for layer 1; find them with `orthorank calibrate`"),
        ({"select": "threshold", "thresholds": {1: math.inf}}, r"thresholds\[1\] is inf; it must be a finite number"),
        ({"thresholds": {1: 0.5}}, r"thresholds is \{1: 0.5\} and select is 'topk'"),
        ({"decode": "threshold"}, "decode is 'threshold' and select is 'topk'"),
    ],
)
def test_every_field_is_checked(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        OrthoRankConfig(**({"layers": [1]} | fields))


def test_thresholds_and_ratios_by_layer_survive_the_file(tmp_path: Path) -> None:
    plan = OrthoRankConfig(
        layers=[2, 3, 10],
        keep_ratios={10: 0.0, 3: 1.0},
        select="threshold",
        thresholds={2: 0.125},  # a removed and a dense layer need none
        decode="threshold",
        criterion="random",
        seed=7,
        kv="selected",
        update_sink=True,
        sinks="auto",
    )
    path = plan.save_pretrained(tmp_path)
    stored = json.loads(path.read_text())
    assert (stored["keep_ratios"], stored["thresholds"]) == ({"3": 1.0, "10": 0.0}, {"2": 0.125})
    assert OrthoRankConfig.from_pretrained(path) == plan
    assert list(plan.keep_ratios) == [3, 10], "sorted once stored"


def test_unknown_newer_keys_warn(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    file.write_text(json.dumps({"layers": [1], "version": "9.0", "zeal": {}, "aura": 1}))
    with pytest.warns(UserWarning, match=r"version 9\.0\) has keys .*aura, zeal"):
        assert OrthoRankConfig.from_pretrained(file).layers == [1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is not a JSON file: .*; copy or write the plan again"),
        ("[1, 2]", "a plan is a JSON object, not list"),
        ("{}", "has no key 'layers'"),
        ('{"layers": [1], "keep_ratio": 7}', r"plan\.json: keep_ratio is 7"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text)
    with pytest.raises(OrthoRankError, match=words):
        OrthoRankConfig.from_pretrained(file)


def test_missing_and_unwritable(tmp_path: Path) -> None:
    with pytest.raises(OrthoRankError, match=r"no plan can be read at .*nowhere: No such file"):
        OrthoRankConfig.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(OrthoRankError, match="the plan cannot be written to"):
        OrthoRankConfig(layers=[1]).save_pretrained(tmp_path / "file" / "below")


def test_nominal_sparsity() -> None:
    assert OrthoRankConfig(layers=list(range(9)), keep_ratio=1 / 3).nominal_sparsity(30) == pytest.approx(0.2)
    assert OrthoRankConfig(layers=list(range(6)), keep_ratio=0, num_hidden_layers=30).nominal_sparsity() == 0.2
    with pytest.raises(OrthoRankError, match="num_hidden_layers is not stated"):
        OrthoRankConfig(layers=[1]).nominal_sparsity()


def test_for_model_states_the_model(tiny_model: Any) -> None:
    plan = OrthoRankConfig.for_model(tiny_model("qwen2"), layers=[1])
    assert (plan.model_type, plan.num_hidden_layers, plan.hidden_size) == ("qwen2", 4, 64)
