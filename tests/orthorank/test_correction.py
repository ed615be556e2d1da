"""A plan's correction on disk: what is saved is loaded, and anything else is refused by name."""

import copy
import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, apply
from orthorank.correction import Correction, LayerMap
from orthorank.plans import shipped_plans

RANK, HIDDEN, LAYERS = 3, 8, (1, 2)


def correction(dtype: torch.dtype = torch.float32, seed: int = 0) -> Correction:
    draw = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    return Correction({i: LayerMap(some(RANK, HIDDEN), some(HIDDEN, RANK), some(HIDDEN)) for i in LAYERS})


def plan(**fields: Any) -> OrthoRankConfig:
    return OrthoRankConfig(**{"layers": [0, 1, 2], "keep_ratio": 0.5, "keep_ratios": {0: 1.0, 2: 0.0}} | fields)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_saved_plan_is_loaded_as_it_was(tmp_path: Path, dtype: torch.dtype) -> None:
    saved = plan(correction=correction(dtype))
    file = saved.save_pretrained(tmp_path)
    for path in (tmp_path, file):
        loaded = OrthoRankConfig.from_pretrained(path)
        assert loaded == saved
        assert loaded.ranks == {1: RANK, 2: RANK}
        for layer in LAYERS:
            for part, wanted in zip(loaded.correction.maps[layer], saved.correction.maps[layer], strict=True):
                assert part.dtype == dtype
                assert torch.equal(part, wanted)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["correction.safetensors", "orthorank.json"]
    assert json.loads(file.read_text())["correction"] == saved.correction.to_dict()


def test_a_plan_without_one_is_written_as_before(tmp_path: Path) -> None:
    for method in ("orthorank", "layer-pruning"):
        for shipped in shipped_plans(method):
            first = shipped.save_pretrained(tmp_path).read_bytes()
            values = json.loads(first)
            fields = {each.name for each in dataclasses.fields(shipped) if each.init}
            assert sorted(values) == sorted(fields - {"correction"})
            assert first == (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
            assert OrthoRankConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again").read_bytes() == first
    assert not list(tmp_path.rglob("*.safetensors"))


def test_copies_are_equal_and_another_correction_is_not() -> None:
    first = plan(correction=correction())
    assert copy.deepcopy(first) == first == pickle.loads(pickle.dumps(first))
    assert first != plan(correction=correction(seed=1))
    assert first != plan()
    assert dataclasses.replace(first, correction=None) == plan()


def test_what_it_was_made_of_may_change(tmp_path: Path) -> None:
    down = torch.ones(1, 4)
    found = Correction({0: LayerMap(down, torch.ones(4, 1), torch.zeros(4))})
    down.zero_()
    assert found.maps[0].down.sum() == 4


BAD_MAPS: dict[str, tuple[Callable[[dict[int, LayerMap]], Any], str]] = {
    "a transposed map": (
        lambda m: m | {2: m[2]._replace(down=m[2].down.T)},
        r"layers\.2\.down has shape \[8, 3\]; with rank 3 and hidden size 8 it must be \[3, 8\]",
    ),
    "another rank": (lambda m: m | {2: m[2]._replace(up=m[2].up[:, :2])}, r"layers\.2\.up has shape \[8, 2\]"),
    "integers": (
        lambda m: m | {1: m[1]._replace(bias=m[1].bias.long())},
        r"layers\.1\.bias has dtype int64; it may",
    ),
    "infinite": (lambda m: m | {1: m[1]._replace(up=m[1].up / 0)}, r"layers\.1\.up holds infinite or NaN"),
    "none": (lambda m: {}, "a map for one layer at least"),
}


@pytest.mark.parametrize("name", BAD_MAPS)
def test_maps_that_are_none_are_refused(name: str) -> None:
    change, message = BAD_MAPS[name]
    with pytest.raises(OrthoRankError, match=message):
        Correction(change(correction().maps))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": [0, 1], "keep_ratios": {}}, r"a map for layer 2, which leaves no token out; .* \[0, 1\]"),
        ({"keep_ratios": {2: 1.0}}, "a map for layer 2, which leaves no token out"),
        ({"hidden_size": 16}, "maps of hidden size 8, and hidden_size is 16"),
        ({"correction": correction().to_dict()}, "read the plan with OrthoRankConfig.from_pretrained"),
        ({"correction": 3}, "correction is an int; it must be a Correction or None"),
    ],
)
def test_a_plan_that_it_does_not_fit(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(OrthoRankError, match=message):
        plan(**{"correction": correction()} | fields)


def rewritten(tmp_path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    file = tmp_path / "correction.safetensors"
    tensors = load_file(file)
    save_file({name: part.contiguous() for name, part in change(tensors).items()}, file)


BAD_FILES: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "a tensor is missing": (
        lambda t: {name: part for name, part in t.items() if name != "layers.2.up"},
        r"has no tensor 'layers\.2\.up'; of this plan it must hold layers\.1\.down",
    ),
    "one too many": (lambda t: t | {"more": torch.ones(1)}, "has the tensor 'more'"),
    "another shape": (
        lambda t: t | {"layers.1.down": torch.ones(RANK, HIDDEN + 1)},
        r"correction\.safetensors: layers\.1\.down has shape \[3, 9\]; .* it must be \[3, 8\]",
    ),
    "another dtype": (
        lambda t: t | {"layers.1.bias": torch.ones(HIDDEN, dtype=torch.float64)},
        r"layers\.1\.bias has dtype F64; it may be float32",
    ),
    "not a number": (
        lambda t: t | {"layers.1.bias": torch.full((HIDDEN,), torch.nan)},
        r"correction\.safetensors: layers\.1\.bias holds infinite or NaN",
    ),
    "of another plan": (lambda t: {name: -part for name, part in t.items()}, "they are of different plans"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_the_plans_is_refused(tmp_path: Path, name: str) -> None:
    plan(correction=correction()).save_pretrained(tmp_path)
    change, message = BAD_FILES[name]
    rewritten(tmp_path, change)
    with pytest.raises(OrthoRankError, match=message):
        OrthoRankConfig.from_pretrained(tmp_path)


def test_shapes_are_refused_before_a_tensor_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(correction=correction()).save_pretrained(tmp_path)
    change, message = BAD_FILES["another shape"]
    rewritten(tmp_path, change)
    monkeypatch.setattr(Correction, "__init__", lambda *given: pytest.fail("maps were made"))
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda *given: pytest.fail("a tensor was read"))
    with pytest.raises(OrthoRankError, match=message):
        OrthoRankConfig.from_pretrained(tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    plan(correction=correction()).save_pretrained(tmp_path)
    file = tmp_path / "correction.safetensors"
    file.write_bytes(pickle.dumps({"layers.1.down": 1}))
    with pytest.raises(OrthoRankError, match="is not a file of tensors"):
        OrthoRankConfig.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(OrthoRankError, match=r"correction\.safetensors, which is not there; keep both files in one"):
        OrthoRankConfig.from_pretrained(tmp_path)
    os.mkfifo(tmp_path / "pipe")  # which would wait for a writer
    for target in (tmp_path / "pipe", Path("/dev/zero")):
        file.unlink(missing_ok=True)
        file.symlink_to(target)
        with pytest.raises(OrthoRankError, match="which is no file"):
            OrthoRankConfig.from_pretrained(tmp_path)


def test_a_file_of_maps_that_is_larger_than_the_plan_says(tmp_path: Path) -> None:
    plan(correction=correction()).save_pretrained(tmp_path)
    file = tmp_path / "correction.safetensors"
    file.write_bytes(file.read_bytes() + b"0" * 2**20)
    with pytest.raises(
        OrthoRankError, match=r"bytes; maps of rank 3 and hidden size 8 for 2 layers, .* at most 1,049,024"
    ):
        OrthoRankConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_maps_are_saved_in_the_dtype_that_is_asked_for(tmp_path: Path, dtype: str) -> None:
    saved = plan(correction=correction())
    saved.save_pretrained(tmp_path / "float32")
    saved.save_pretrained(tmp_path / dtype, maps_dtype=dtype)
    loaded = OrthoRankConfig.from_pretrained(tmp_path / dtype)
    for layer in LAYERS:
        for part, wanted in zip(loaded.correction.maps[layer], saved.correction.maps[layer], strict=True):
            assert torch.equal(part, wanted.to(getattr(torch, dtype)))
    assert saved == plan(correction=correction())
    assert (loaded == saved) == (dtype == "float32")
    small, large = (tmp_path / each / "correction.safetensors" for each in (dtype, "float32"))
    assert (small.stat().st_size < large.stat().st_size) == (dtype != "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@torch.no_grad()
def test_maps_in_fewer_bytes_are_applied_in_float32(tiny_model: Callable[..., Any], dtype: str) -> None:
    model, ids = tiny_model("llama", hidden_size=HIDDEN, head_dim=4), torch.arange(3, 15)[None]
    logits = []
    for maps in (correction(), correction().to(dtype), correction().to(dtype).to("float32")):
        with apply(model, plan(correction=maps)):
            logits.append(model(ids).logits)
    assert torch.equal(logits[1], logits[2])
    assert 0 < (logits[0] - logits[1]).abs().max() < 0.05 * logits[0].abs().max()


@pytest.mark.parametrize(
    ("part", "factor", "message"),
    [
        ("down", 1e6, r"layers\.1\.down holds [1-9.]*e\+06, and float16 ends at 6\.55e\+04; save the maps as bfloat16"),
        (
            "up",
            1e-9,
            r"row 2 of layers\.1\.up, whose largest number is .*e-(09|10), would lose 100% of its length in float16",
        ),
        ("down", 1e-7, r"row 2 of layers\.1\.down, whose largest number is .*e-07, would lose [0-9]+% of its"),
        (
            "bias",
            1e-10,
            r"layers\.1\.bias, whose largest number is .*, which has full precision from 6\.1e-05 on; save",
        ),
    ],
)
def test_maps_that_float16_cannot_hold(tmp_path: Path, part: str, factor: float, message: str) -> None:
    """Nothing is written, and bfloat16 holds them all."""
    found = correction()
    changed = getattr(found.maps[1], part).clone()
    changed[2 if part != "bias" else slice(None)] *= factor
    made = plan(correction=Correction(found.maps | {1: found.maps[1]._replace(**{part: changed})}))
    with pytest.raises(OrthoRankError, match=message):
        made.save_pretrained(tmp_path / "plan", maps_dtype="float16")
    assert not (tmp_path / "plan").exists()
    made.save_pretrained(tmp_path / "plan", maps_dtype="bfloat16")
    assert OrthoRankConfig.from_pretrained(tmp_path / "plan").ranks == made.ranks


def test_rows_of_zeros_are_zeros_in_any_dtype() -> None:
    zeros = Correction({0: LayerMap(torch.zeros(1, 4), torch.zeros(4, 1), torch.zeros(4))})
    assert zeros.to("float16").maps[0].up.dtype == torch.float16
    assert zeros.to("float32") is zeros


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], r"correction is a record \[1\]; a plan's JSON says rank, hidden_size"),
        ({"rank": 1}, "without hidden_size, layers, sha256"),
        ({"rank": -1}, r"correction\['rank'\] is -1"),
        ({"hidden_size": 1.5}, r"correction\['hidden_size'\] is 1.5"),
        ({"layers": "12"}, r"correction\['layers'\] is '12'"),
        ({"sha256": None}, r"correction\['sha256'\] is None"),
        ({"hidden_size": 9}, r"layers\.1\.down has shape \[3, 8\]"),
    ],
)
def test_a_record_that_says_something_else(tmp_path: Path, record: Any, message: str) -> None:
    file = plan(correction=correction()).save_pretrained(tmp_path)
    values = json.loads(file.read_text())
    whole = isinstance(record, list) or message.startswith("without")
    values["correction"] = record if whole else values["correction"] | record
    file.write_text(json.dumps(values))
    with pytest.raises(OrthoRankError, match=message):
        OrthoRankConfig.from_pretrained(tmp_path)
