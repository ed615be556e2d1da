"""Plans at the edges of what JSON, Python and a disk can hold: right, or refused with the field's name."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import orthorank
from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.cli import main
from orthorank.common.files import from_json, user_path, write_bytes, write_json
from orthorank.plan_checks import MOST
from orthorank_kernels.counts import MAX_COUNT, MAX_KEEP_LAST

THRESHOLD = {"select": "threshold"}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (THRESHOLD | {"thresholds": {1: 10**400}}, r"thresholds\[1\] is an integer of 1,329 bits; it must be a finite"),
        (THRESHOLD | {"thresholds": {1: -(10**400)}}, r"thresholds\[1\] is an integer of"),
        (
            {"select": "window", "select_window": 2**70},
            "select_window is 1180591620717411303424; it must be",
        ),
        ({"keep_last": 2**40}, "keep_last is 1099511627776; it must be an integer from 0 to 8,388,608"),
        ({"keep_last": 10**5000}, "keep_last is an integer of 16,610 bits"),
        ({"keep_ratio": 10**5000}, "keep_ratio is an integer of 16,610 bits"),
        ({"keep_ratios": {1: 10**400}}, r"keep_ratios\[1\] is an integer of"),
        ({"keep_ratios": {"9" * 5000: 0.5}}, "keep_ratios has the key '999"),
        ({"seed": 2**63}, "seed is 9223372036854775808"),
        ({"hidden_size": 2**64}, "hidden_size is 18446744073709551616"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"sink_layer": 10**9}, "sink_layer is 1000000000"),
        ({"layers": [2**70]}, "layers holds 1180591620717411303424; no model has as many layers"),
        ({"layers": [10**5000]}, "layers holds an integer of 16,610 bits"),
        ({"layers": [10**5000, 1.5]}, "layers is a list|layers is "),
        ({"calibration": {1: 2, "a": 3}}, "calibration has the key 1; keys must be strings, such as '1'"),
        ({"measured": {"by": {2: 0.5}}}, r"measured\['by'\] has the key 2"),
        ({"measured": {"by": [1, {None: 0.5}]}}, r"measured\['by'\]\[1\] has the key None"),
        ({"calibration": {"a": {1, 2}}}, r"calibration\['a'\] is a set"),
        ({"calibration": {"a": torch.ones(2)}}, r"calibration\['a'\] is a Tensor"),
        ({"measured": {"a": np.float32(1)}}, r"measured\['a'\] is a float32"),
        ({"measured": {"a": 10**400}}, r"measured\['a'\] is an integer of"),
        ({"version": "newest"}, "version is 'newest'; it must be a version of this package, such as '0.1.0'"),
        ({"version": ""}, "version is ''"),
        ({"version": None}, "version is None; it must be a string"),
    ],
)
def test_fields_at_the_edge_are_refused_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        OrthoRankConfig(**({"layers": [1]} | fields))


def test_the_largest_legal_numbers_run(tiny_model: Any) -> None:
    """The bounds are those of the kernels: what a plan may hold, a forward takes."""
    assert (MOST["keep_last"], MOST["select_window"]) == (MAX_KEEP_LAST, MAX_COUNT)
    model, ids = tiny_model("llama"), torch.arange(3, 15)[None]
    for fields in (
        {"select": "window", "select_window": MOST["select_window"]},
        {"keep_last": MOST["keep_last"]},
        {"criterion": "random", "seed": MOST["seed"]},
        THRESHOLD | {"thresholds": {1: 1.7e308}},
    ):
        with orthorank.apply(model, OrthoRankConfig(**({"layers": [1]} | fields))), torch.no_grad():
            assert torch.isfinite(model.generate(ids, max_new_tokens=2, do_sample=False).float()).all()


def test_records_of_numpy_floats_and_tuples_are_kept(tmp_path: Path) -> None:
    plan = OrthoRankConfig(layers=[1], measured={"loss": np.float64(1.5), "of": (1, None, True), "worst": float("inf")})
    found = OrthoRankConfig.from_pretrained(plan.save_pretrained(tmp_path)).measured
    assert found == {"loss": 1.5, "of": [1, None, True], "worst": None}


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every write to a file fails when some of it is written already."""

    def write(self: Path, content: bytes) -> int:
        with self.open("wb") as file:
            file.write(content[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans, results, figures and saved searches all go through one writer."""
    pytest.importorskip("matplotlib")
    from orthorank.analysis.figures import draw_chosen_layers
    from orthorank.reproduce.cells import Cells
    from orthorank.search.one_shot import ScoreState
    from orthorank.search.state import SearchState

    plan = OrthoRankConfig(layers=[1])
    path = plan.save_pretrained(tmp_path)
    before = path.read_bytes()
    full_disk(monkeypatch)
    writers = (
        lambda: OrthoRankConfig(layers=[2]).save_pretrained(tmp_path),
        lambda: write_json(path, {}),
        lambda: draw_chosen_layers({"plan": {1: 0.5}}, 4, tmp_path),
        lambda: SearchState(candidates=[1], rounds=1).save(path),
        lambda: ScoreState(candidates=[1]).save(path),
        lambda: Cells(tmp_path, {}).get("cell", {}, lambda: 1),
    )
    for write in writers:
        with pytest.raises(OrthoRankError, match="cannot be written: No space left on device"):
            write()
        assert [file.name for file in tmp_path.iterdir()] == ["orthorank.json"]
        assert path.read_bytes() == before


def test_a_disk_on_which_nothing_can_be_removed_says_what_failed_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch)

    def unlink(self: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OrthoRankError, match="No space left on device"):
        write_bytes(tmp_path / "a", b"content")


def test_settings_of_a_gpu_are_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels' own writer, of measured launch settings."""
    from orthorank_kernels.tuning import tune as tuning

    def replace(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tuning.os, "replace", replace)
    with pytest.raises(OSError, match="No space left"):
        tuning.save("silu_and_mul", "Some GPU", {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_was_changed_to_something_illegal_is_not_written(tmp_path: Path) -> None:
    plan = OrthoRankConfig(layers=[1])
    for name, value in (("measured", {1: 2, "a": 3}), ("keep_ratio", 7)):
        changed = OrthoRankConfig(layers=[1])
        setattr(changed, name, value)
        with pytest.raises(OrthoRankError, match=name):
            changed.save_pretrained(tmp_path / "new")
        assert not (tmp_path / "new").exists()
    assert plan.save_pretrained(tmp_path / "new").exists()


LONG = "x" * 5000


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (LONG, r"plan is 'x{24}\.\.\.' \(5000 characters\), which cannot be the path of a file: File name too long"),
        ("a\0b", "plan is 'a.x00b', which cannot be the path of a file: .*embedded null"),
        (5, "plan is an int; it must be the path of a file or folder"),
        (None, "plan is None; it must be the path"),
        ("~nobody-has-this-name/plan", "there is no such home directory"),
    ],
)
def test_what_is_no_path(path: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        OrthoRankConfig.from_pretrained(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["doctor", LONG],
        ["eval", "ppl", "--text", LONG],
        ["search", "--dataset", f"c4:{LONG}"],
        ["vllm-args", LONG],
        ["eval", "ppl", "--output", f"{LONG}/a.json"],
        ["eval", "tasks", "--include-path", LONG],
    ],
)
def test_a_name_that_no_file_can_have_is_one_sentence(
    arguments: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a search claims its folder first
    assert main(arguments) == 2
    assert "File name too long" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({1: 2, "layers": [1], "a": 2}, "the plan has the key 1; its keys must be names of fields, strings"),
        ({None: 2, "layers": [1]}, "the plan has the key None"),
        ("layers", "a plan is a JSON object, not str"),
        ({"layers": {"1": 2}}, "layers is {'1': 2}"),
        ({"layers": [1], "thresholds": None}, "thresholds is None; it must be a mapping"),
        ({"layers": [1], "criterion": []}, r"criterion is \[\]"),
    ],
)
def test_what_is_no_plan(values: Any, words: str) -> None:
    with pytest.raises(OrthoRankError, match=words):
        OrthoRankConfig.from_dict(values)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"layers": [1], "layers": [2]}', "the key 'layers' is there twice"),
        ('{"layers": [1], "keep_ratios": {"1": 0.5, "1": 0.25}}', "the key '1' is there twice"),
        ('{"layers": [1], "measured": {"a": [{"b": 1, "b": 2}]}}', "the key 'b' is there twice"),
        ("[" * 100_000, "is not a JSON file: it is nested too deeply"),
        ("1" * 10_000, "is not a JSON file"),
        ("\ufeff{}", "the plan has no key 'layers'"),
        ('{"layers": [1], "keep_ratio": NaN}', "keep_ratio is nan"),
    ],
)
def test_json_that_says_a_thing_twice_or_nothing(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "plan.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(OrthoRankError, match=words):
        OrthoRankConfig.from_pretrained(file)


def test_duplicate_keys_of_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    from orthorank.commands.bench_vllm import _arguments

    with pytest.raises(OrthoRankError, match="it must be a JSON object"):
        _arguments('{"dtype": "float32", "dtype": "bfloat16"}', None)
    assert from_json('{"a": {"b": 1}, "b": 2}') == {"a": {"b": 1}, "b": 2}


def test_a_newer_version_and_no_layers_are_said(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"written by version 99\.0, and this is .*what its fields mean may have changed"
    ):
        OrthoRankConfig.from_dict({"layers": [1], "version": "99.0"})
    file = tmp_path / "orthorank.json"
    file.write_text(json.dumps({"layers": []}))
    with pytest.warns(UserWarning, match="names no layers: with it a model is the dense one"):
        assert OrthoRankConfig.from_pretrained(tmp_path).layers == []


def test_plans_of_this_and_older_versions_say_nothing(recwarn: pytest.WarningsRecorder) -> None:
    for version in ("0.0.9", "0.1.0", "0.1.0.dev3"):
        OrthoRankConfig.from_dict({"layers": [1], "version": version})
    OrthoRankConfig.from_dict({"layers": [1]})
    from orthorank.plans import shipped_plans

    assert shipped_plans()
    assert shipped_plans("layer-pruning")
    assert not recwarn.list


def test_a_pipe_or_a_device_is_no_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reading one would wait for somebody to write, or never end."""
    os.mkfifo(tmp_path / "orthorank.json")
    pipe, device = tmp_path / "to-a-pipe", tmp_path / "to-a-device"
    pipe.symlink_to(tmp_path / "orthorank.json")
    device.symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "orthorank.json", Path("/dev/zero"), pipe, device):
        with pytest.raises(OrthoRankError, match="it is a pipe or a device; give an ordinary file"):
            OrthoRankConfig.from_pretrained(path)
    assert main(["vllm-args", str(tmp_path)]) == 2
    assert "it is a pipe or a device" in capsys.readouterr().err


def test_a_plan_has_at_most_one_mebibyte(tmp_path: Path) -> None:
    """One that is larger is not read, wherever it is, and not written either."""
    plan = OrthoRankConfig(layers=[1], calibration={"text": "a"})
    file = plan.save_pretrained(tmp_path)
    plan.calibration["text"] = "a" * (2**20 - file.stat().st_size + 1)
    assert plan.save_pretrained(tmp_path).stat().st_size == 2**20
    assert OrthoRankConfig.from_pretrained(tmp_path) == plan
    plan.calibration["text"] += "a"
    with pytest.raises(
        OrthoRankError, match="the plan has 1,048,577 bytes as JSON, and may have 1,048,576; shorten its"
    ):
        plan.save_pretrained(tmp_path)
    assert file.stat().st_size == 2**20
    file.write_text(file.read_text() + " ")
    link = tmp_path / "link"
    link.symlink_to(file)
    for path in (file, tmp_path, link):
        with pytest.raises(OrthoRankError, match=r"no plan can be read at .*: it has more than 1,048,576 bytes"):
            OrthoRankConfig.from_pretrained(path)


def test_a_path_that_is_not_there_yet_is_a_path(tmp_path: Path) -> None:
    assert user_path("output", tmp_path / "new" / "folder") == tmp_path / "new" / "folder"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["search", "--window", "9" * 30], "orthorank: --window is 999"),
        (["demo", "--prompt-tokens", str(2**31)], "--prompt-tokens is 2147483648; it must be at most 2,147,483,647"),
        (["bench", "--threads", str(2**70)], "--threads is"),
        (["eval", "ppl", "--batch-size", str(2**70)], "--batch-size is"),
        (["eval", "tasks", "--limit", str(-(2**40))], "--limit is -1099511627776; it must be at least -2,147,483,647"),
        (["calibrate", "--keep-last", str(2**30)], "keep_last is 1073741824; it must be an integer from 0 to"),
        (["search", "--memory", "1e308"], "memory is 1e.308; it must be 0"),
        (["vllm-args", "plan", "--block-size", str(2**40)], "--block-size is"),
    ],
)
def test_numbers_that_overflow_somewhere_are_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(arguments) == 2
    assert re.search(words, capsys.readouterr().err)
