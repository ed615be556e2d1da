"""Launch settings: read from files, the nearest measured one first, with a default for every GPU."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from orthorank_kernels.settings import lookup as _settings

OP = "sparse_query_attention"
KIND = "16-bit, head_dim 128"
TILE = {"block_m": 64, "block_n": 16, "num_stages": 3, "num_warps": 2}
FAMILIES = ("volta", "ampere", "ampere-small", "hopper", "blackwell", "amd", _settings.INTERPRETER)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ORTHORANK_CONFIG_DIR", str(tmp_path))
    _settings.forget()
    yield
    _settings.forget()


def write(folder: Path, device: str, settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / _settings.file_name(OP, device)
    path.write_text(json.dumps({"device": device, "op": OP, "settings": settings}))
    return path


def files() -> list[Path]:
    found = sorted(_settings.SHIPPED.glob("*.json"))
    assert found
    return found


@pytest.mark.parametrize("path", files(), ids=lambda path: path.name)
def test_every_file_says_what_it_is_and_names_the_kinds_of_the_others(path: Path) -> None:
    content = json.loads(path.read_text())
    assert path.name == _settings.file_name(content["op"], content["device"])
    assert content["settings"].keys() <= set(_settings.kinds(content["op"]))
    assert _settings.read(path, content["op"]) == content["settings"]


def test_every_op_has_a_default_for_every_family() -> None:
    assert {json.loads(p.read_text())["op"] for p in files()} == set(_settings.FIELDS)
    for op in _settings.FIELDS:
        for family in FAMILIES:
            assert _settings._defaults(op, family).keys() == set(_settings.kinds(op)), f"{op} on {family}"


def test_a_launch_looks_up_what_the_files_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind is one that some launch asks for, and no launch asks for another one."""
    pytest.importorskip("triton")
    from orthorank_kernels.triton import (
        activation,
        add_norm,
        configs,
        low_rank,
        norm_selection,
        rotary,
        rows,
        scoring,
        selection,
    )

    asked: set[tuple[str, str]] = set()

    def noted(op: str, kind: str, target: str) -> _settings.Settings:
        asked.add((op, kind))
        return _settings.default(op, kind, target)

    monkeypatch.setattr(_settings, "look_up", noted)
    for size in (8, 64, 512, 577, 1024, 2048, 4096, 8192, 20480):
        for itemsize in (2, 4):
            rows.copy_settings("gather_rows", size, itemsize, "sm_90")
            rows.copy_settings("scatter_rows_", size, itemsize, "sm_90")
            activation.launch_settings(size, itemsize, "sm_90")
        low_rank.launch_settings(size, 64, 2, "sm_90")
        low_rank.launch_settings(size, 64, 4, "sm_90")
        add_norm.norm_settings(size, 1000, "sm_90")
        scoring.launch_settings(2, 100, size, 2 * size, 2 * size, "sm_90")
        for packed in (False, True):
            for by_threshold in (False, True):
                selection.select_settings(size, packed, by_threshold, "sm_90")
                norm_selection.select_settings(size, packed, by_threshold, 8, "sm_90")
    for heads, dim in ((1, 64), (9, 64), (32, 128), (71, 64), (8, 256)):
        rotary.launch_settings(heads, dim, dim, 2, "sm_90")
        rotary.launch_settings(heads, dim, dim // 2, 4, "sm_90")
    for dim in (1, 64, 80, 128, 256):
        for dtype in (torch.float32, torch.bfloat16):
            for queries in (1, 8, 100, None):
                configs.launch_settings(dim, 4, dtype, "sm_90", queries)
    found = {(op, kind) for op in _settings.FIELDS for kind in _settings.kinds(op) if op != "combine_splits"}
    assert asked == found


@pytest.mark.parametrize(
    ("target", "expected"),
    [("sm_75", "volta"), ("sm_80", "ampere"), ("sm_86", "ampere-small"), ("sm_87", "ampere"), ("sm_89", "ampere-small"),
     ("sm_90", "hopper"), ("sm_90 NVIDIA H100 80GB HBM3", "hopper"), ("sm_100", "blackwell"), ("sm_103", "blackwell"),
     ("sm_120", "ampere-small"), ("gfx942", "amd"), ("gfx1100 AMD Radeon", "amd"), ("interpreter", "interpreter")],
)  # fmt: skip
def test_families(target: str, expected: str) -> None:
    assert _settings.family(target) == expected
    assert _settings.default(OP, KIND, target) == _settings._defaults(OP, expected)[KIND]


def test_a_family_without_a_gpu_takes_its_default_and_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _settings.look_up(OP, KIND, "sm_90") == _settings.default(OP, KIND, "sm_90")


def test_an_unmeasured_gpu_is_warned_about_once_with_the_command_that_cures_it() -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for kind in (KIND, KIND, "32-bit, head_dim 64"):
            assert _settings.look_up(OP, kind, "sm_90 Some GPU") == _settings.default(OP, kind, "sm_90")
    assert len(seen) == 1
    assert "no launch settings were measured on Some GPU" in str(seen[0].message)
    assert seen[0].filename == __file__, "the line of the caller"
    assert str(seen[0].message).endswith("to measure, run: orthorank-kernels tune")


def test_the_users_file_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three, four = (TILE | {"block_m": n} for n in (16, 32, 64, 128))
    shipped = tmp_path / "shipped"
    write(shipped, "hopper", {KIND: one, "other": two})
    write(shipped, "Some GPU", {KIND: three, "other": four})
    monkeypatch.setattr(_settings, "SHIPPED", shipped)
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == three
    mine = TILE | {"num_warps": 1}
    write(tmp_path, "Some GPU", {KIND: mine})
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == three, "files are read once"
    _settings.forget()
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == mine
    assert _settings.look_up(OP, "other", "sm_90 Some GPU") == four
    assert _settings.look_up(OP, KIND, "sm_90") == one


def test_without_the_variable_the_users_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORTHORANK_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert _settings.user_folder() == tmp_path / "orthorank-kernels"
    write(tmp_path / "orthorank-kernels", "Some GPU", {KIND: TILE})
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == TILE


TEXT = json.dumps({"settings": {"kind": TILE}})
BROKEN = {
    "": "Expecting value",
    "[]": "no object with an object of 'settings'",
    "{}": "no object with an object of 'settings'",
    '{"settings": 1}': "no object with an object of 'settings'",
    '{"settings": {"kind": 1}}': "'kind' is 1; it must be an object",
    TEXT.replace("64", "0"): "block_m of 'kind' is 0; it must be a power of two from 16 to 512",
    TEXT.replace("64", "48"): "block_m of 'kind' is 48; it must be a power of two from 16 to 512",
    TEXT.replace("64", "64.0"): "block_m of 'kind' is 64.0; it must be a power of two",
    TEXT.replace("64", "true"): "block_m of 'kind' is True; it must be a power of two",
    TEXT.replace("64", "1" * 5000): "limit",
    TEXT.replace('"num_stages": 3', '"num_stages": 9'): "num_stages of 'kind' is 9; it must be an int from 1 to 8",
    TEXT.replace('"num_stages": 3, ', ""): "'kind' has no 'num_stages'",
    TEXT.replace('"num_stages"', '"stages"'): "'kind' has no 'num_stages'",
    TEXT.replace('{"kind', '{"other": {"tile": 1}, "kind'): "'other' has no 'block_m'",
    TEXT.replace('"block_m"', '"aim": 1, "block_m"'): f"'kind' has 'aim'; settings of {OP} are block_m, block_n",
    "[" * 100_000: "nested too deeply",
}


@pytest.mark.parametrize(("text", "fault"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_file_is_named_with_the_fault_and_the_remedy(text: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / _settings.file_name(OP, "Some GPU")
    path.write_text(text)
    with pytest.raises(_settings.SettingsError) as caught:
        _settings.look_up(OP, KIND, "sm_90 Some GPU")
    message = str(caught.value)
    assert message.startswith(f"{path} holds no launch settings (")
    assert fault in message
    assert message.endswith("delete it, or write it anew with: orthorank-kernels tune")


def test_what_is_no_text_or_no_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / _settings.file_name(OP, "Some GPU")
    path.write_bytes(b'{"settings": \xff}')
    with pytest.raises(_settings.SettingsError, match=r"byte 13 is no UTF-8"):
        _settings.look_up(OP, KIND, "sm_90 Some GPU")
    path.unlink()
    path.mkdir()
    with pytest.raises(_settings.SettingsError, match=rf"{path.name} holds no launch settings \(Is a directory\)"):
        _settings.look_up(OP, KIND, "sm_90 Some GPU")
