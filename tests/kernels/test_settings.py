"""Launch settings: read from files, the nearest measured one first, with a default for every GPU."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from orthorank_kernels import _settings

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
    of_the_op = [json.loads(p.read_text())["settings"] for p in files() if p.name.startswith(f"{content['op']}.")]
    assert all(settings.keys() == content["settings"].keys() for settings in of_the_op)
    names = {frozenset(values) for settings in of_the_op for values in settings.values()}
    assert len(names) == 1, "settings of one op have the same names for every GPU"
    assert _settings.read(path) == content["settings"]


def test_every_op_has_a_default_for_every_family() -> None:
    ops = {json.loads(p.read_text())["op"] for p in files()}
    missing = {_settings.file_name(op, f) for op in ops for f in FAMILIES} - {p.name for p in files()}
    assert not missing


@pytest.mark.parametrize(
    ("target", "expected"),
    [("sm_75", "volta"), ("sm_80", "ampere"), ("sm_86", "ampere-small"), ("sm_87", "ampere"), ("sm_89", "ampere-small"),
     ("sm_90", "hopper"), ("sm_90 NVIDIA H100 80GB HBM3", "hopper"), ("sm_100", "blackwell"), ("sm_103", "blackwell"),
     ("sm_120", "ampere-small"), ("gfx942", "amd"), ("gfx1100 AMD Radeon", "amd"), ("interpreter", "interpreter")],
)  # fmt: skip
def test_families(target: str, expected: str) -> None:
    assert _settings.family(target) == expected
    assert _settings.default(OP, KIND, target) == _settings._shipped(OP, expected)[KIND]


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
    assert str(seen[0].message).endswith("to measure, run: orthorank-kernels tune")


def test_the_users_file_comes_before_the_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two, three, four = (TILE | {"block_m": n} for n in (1, 2, 3, 4))
    shipped = tmp_path / "shipped"
    write(shipped, "hopper", {KIND: one, "other": two})
    write(shipped, "Some GPU", {KIND: three, "other": four})
    monkeypatch.setattr(_settings, "SHIPPED", shipped)
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == three
    write(tmp_path, "Some GPU", {KIND: TILE})
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == three, "files are read once"
    _settings.forget()
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == TILE
    assert _settings.look_up(OP, "other", "sm_90 Some GPU") == four
    assert _settings.look_up(OP, KIND, "sm_90") == one


def test_without_the_variable_the_users_folder_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORTHORANK_CONFIG_DIR")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert _settings.user_folder() == tmp_path / "orthorank-kernels"
    write(tmp_path / "orthorank-kernels", "Some GPU", {KIND: TILE})
    assert _settings.look_up(OP, KIND, "sm_90 Some GPU") == TILE


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"settings": 1}', '{"settings": {"kind": 1}}', '{"settings": {"kind": {"block_m": 0}}}',
     '{"settings": {"kind": {"block_m": 1.5}}}', '{"settings": {"kind": {"block_m": true}}}',
     '{"settings": {"kind": {"block_m": 64, "block_n": 64, "num_warps": 4}}}'],
)  # fmt: skip
def test_a_broken_file_is_named_with_the_remedy(text: str, tmp_path: Path) -> None:
    path = tmp_path / _settings.file_name(OP, "Some GPU")
    path.write_text(text)
    with pytest.raises(_settings.SettingsError, match=f"{path.name} holds no launch settings.*orthorank-kernels tune"):
        _settings.look_up(OP, KIND, "sm_90 Some GPU")
