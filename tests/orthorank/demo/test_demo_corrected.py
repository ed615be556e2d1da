"""The demo keeps a corrected plan as one that can be read again."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from orthorank import OrthoRankConfig
from orthorank.correction import Correction, LayerMap
from orthorank.demo.run import Run


def test_the_plan_in_the_demos_folder(tmp_path: Path) -> None:
    maps = Correction({1: LayerMap(torch.ones(1, 8), torch.ones(8, 1), torch.ones(8))})
    plan = OrthoRankConfig(layers=[1], correction=maps)
    run: Any = SimpleNamespace(folder=tmp_path, results={})
    Run.save_plan(run, "orthorank", plan)
    assert OrthoRankConfig.from_pretrained(tmp_path) == plan
