"""Fits that are interrupted, kept on disk, or of a model whose layers are elsewhere, end with the same bits."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from orthorank import OrthoRankConfig, OrthoRankError, fit_correction
from orthorank.calibration import calibrate
from orthorank.calibration.spilled import spilled
from tests.orthorank.models import plain
from tests.orthorank.search.test_search_offload import PLACES, offloaded, saved  # noqa: F401

PLAN = OrthoRankConfig(layers=[1, 2, 3], keep_ratio=0.4, keep_ratios={2: 0.0})


class Stopped(Exception):
    """Somebody ends the process."""


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 128, (9, 30), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("target", ["dense", "layer"])
@pytest.mark.parametrize("select", ["topk", "threshold"])
@pytest.mark.parametrize("stop", [1, 3])
def test_a_fit_that_goes_on_ends_with_the_same_bits(
    ids: Tensor, tmp_path: Path, target: str, select: str, stop: int
) -> None:
    model, file = plain("llama"), tmp_path / "state"
    plan = PLAN if select == "topk" else calibrate(model, ids, PLAN)
    whole = fit_correction(model, ids, plan, rank=8, target=target, batch_size=4)

    def end(done: int, *_: Any) -> None:
        if done == stop:
            raise Stopped

    with pytest.raises(Stopped):
        fit_correction(model, ids, plan, rank=8, target=target, batch_size=4, save_to=file, on_layer=end)
    assert file.exists() == (stop > 1)
    size = None if file.exists() else 4  # as the file says
    again = fit_correction(model, ids, plan, rank=8, target=target, batch_size=size, save_to=file)
    assert again == whole
    assert again.calibration == whole.calibration


def test_what_is_fitted_is_not_fitted_again(ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, file = plain("llama"), tmp_path / "state"
    whole = fit_correction(model, ids, PLAN, rank=8, save_to=file)
    monkeypatch.setattr("orthorank.calibration.fitting.fit_map", None)
    assert fit_correction(model, ids, PLAN, rank=8, save_to=file) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 9}, "its rank is 8 and now it is 9"),
        ({"target": "layer"}, "its target is 'dense' and now it is 'layer'"),
        ({"batch_size": 3}, "its batch_size is 4 and now it is 3"),
        ({"plan": dataclasses.replace(PLAN, keep_ratio=0.5)}, "its plan is"),
        ({"input_ids": torch.ones(9, 30, dtype=torch.long)}, "its calibration text or windows are not"),
        ({"model": plain("llama", seed=5)}, "its model's weights are not"),
    ],
)
def test_another_fit_does_not_go_on(ids: Tensor, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    given = {"model": plain("llama"), "input_ids": ids, "plan": PLAN, "rank": 8, "batch_size": 4}
    file = tmp_path / "state"
    fit_correction(**given, save_to=file)
    before = file.read_bytes()
    with pytest.raises(OrthoRankError, match=message):
        fit_correction(**given | change, save_to=file)
    assert file.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"{}", b"x" * 100])
def test_a_broken_record(ids: Tensor, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(OrthoRankError, match="is no record of an unfinished fit; delete it to begin anew"):
        fit_correction(plain("llama"), ids, PLAN, rank=8, save_to=tmp_path / "state")


@pytest.mark.parametrize("target", ["dense", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_in_files(ids: Tensor, tmp_path: Path, target: str, dtype: torch.dtype) -> None:
    model = plain("llama").to(dtype)
    whole, seen = fit_correction(model, ids, PLAN, rank=8, target=target), []
    found = fit_correction(
        model,
        ids,
        PLAN,
        rank=8,
        target=target,
        spill=tmp_path / "new",
        on_layer=lambda *_: seen.append(sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())),
    )
    assert found == whole
    size = ids.numel() * model.config.hidden_size * dtype.itemsize
    assert seen == ([size, 2 * size, 2 * size, 2 * size] if target == "dense" else 4 * [size])
    assert not list((tmp_path / "new").iterdir())


def test_a_folder_that_cannot_hold_the_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OrthoRankError, match=r"spill is '.*file', which is not a folder"), spilled(tmp_path / "file"):
        pass

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full, raising=False)
    with (
        pytest.raises(OrthoRankError, match=r"4.0 MiB of states .* No space left on device"),
        spilled(tmp_path) as keep,
    ):
        keep("state", 0, torch.zeros(2**20))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("places", PLACES)
def test_offloaded_models(saved: Path, tmp_path: Path, places: str) -> None:  # noqa: F811
    """Layers that accelerate keeps on disk are fitted as they are, and stay there."""
    from transformers import AutoModelForCausalLM

    ids = torch.randint(3, 64, (8, 24), generator=torch.Generator().manual_seed(0))
    plan = OrthoRankConfig(layers=[2, 3, 4], keep_ratio=0.4, keep_ratios={3: 0.0})
    model = offloaded(saved, PLACES[places], tmp_path)
    found = fit_correction(model, ids, plan, rank=8)
    assert found.correction == fit_correction(AutoModelForCausalLM.from_pretrained(saved), ids, plan, rank=8).correction
    assert any(parameter.device.type == "meta" for parameter in model.parameters())
