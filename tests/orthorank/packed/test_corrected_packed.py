"""What does not run the maps of a corrected plan refuses it by name, instead of following it without them."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from contrib.budget.job import read_starts
from orthorank import OrthoRankConfig, OrthoRankError
from orthorank.correction import Correction, LayerMap
from orthorank.packed import make_step
from orthorank.serving.vllm.checks import plan_obstacles
from orthorank.serving.vllm.serving import Serving

PLAN = OrthoRankConfig(
    layers=[1, 2], correction=Correction({2: LayerMap(torch.ones(1, 8), torch.ones(8, 1), torch.ones(8))})
)


def test_a_step_of_a_packed_layer() -> None:
    with pytest.raises(OrthoRankError, match=r"the plan is corrected \(rank 1, layers \[2\]\), and a layer over"):
        make_step(PLAN, [0, 5], [0], [5], [0], torch.device("cpu"))


def test_vllm_and_its_arguments(tmp_path: Path) -> None:
    assert "apply it to a Hugging Face model, or serve it uncorrected" in next(plan_obstacles(Serving(PLAN)))
    PLAN.save_pretrained(tmp_path)
    assert next(plan_obstacles(Serving.of(str(tmp_path)))).startswith("the plan is corrected")
    with pytest.raises(OrthoRankError, match=r"correction\.safetensors beside it, without the maps"):
        Serving.of(Serving(PLAN).to_dict())


def test_a_search_that_would_start_from_it(tmp_path: Path) -> None:
    PLAN.save_pretrained(tmp_path)
    with pytest.raises(OrthoRankError, match="a corrected plan, and this search measures plans without maps"):
        read_starts(SimpleNamespace(starts=("none", str(tmp_path))))  # type: ignore[arg-type]
