"""A run in progress: what it works on, the results so far, and their files."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.files import write_json, write_text
from orthorank.common.progress import Screen
from orthorank.config import FILE_NAME, OrthoRankConfig
from orthorank.correction import FILE_NAME as MAPS_NAME
from orthorank.demo.settings import Settings
from orthorank.evaluation.prompts import Prompt
from orthorank.models import ModelInfo
from orthorank.report import html_page
from orthorank.search.calibration import Calibration

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


RESULTS, REPORT = "results.json", "report.html"
PLAN_FILES = {  # by the row that they are of; maps lie beside their plan, so a corrected one has a folder of its own
    "orthorank": FILE_NAME,
    "layer-pruning": FILE_NAME.replace(".json", "-pruning.json"),
    "orthorank-corrected": f"corrected/{FILE_NAME}",
    "layer-pruning-corrected": f"corrected-pruning/{FILE_NAME}",
}


@dataclass
class Run:
    """A run in progress.

    Args:
        folder: where the files go; model, tokenizer, info: what it works on.
        calibration: the windows that layers are searched on and maps fitted, and those held out from both.
        began: on the clock of `time.perf_counter`. prompts: that are answered. results: what `results.json` holds.
    """

    settings: Settings
    screen: Screen
    folder: Path
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    info: ModelInfo
    calibration: Calibration
    began: float
    prompts: list[Prompt] = field(default_factory=list)
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def held_out(self) -> "Tensor":
        """The windows that perplexity is measured on, int64 ``[windows, tokens]``."""
        assert self.calibration.held_out is not None  # a text always has some
        return self.calibration.held_out

    def save(self) -> None:
        """Write what is known so far: the results and the page."""
        self.results["seconds"]["total"] = round(time.perf_counter() - self.began, 1)
        write_json(self.folder / RESULTS, self.results)
        write_text(self.folder / REPORT, html_page(self.results))

    def save_plan(self, name: str, plan: OrthoRankConfig) -> None:
        """Write a plan to the file of the row ``name`` in the folder, and the maps of a corrected one beside it."""
        file = self.folder / PLAN_FILES[name]
        if plan.correction is not None:
            plan.save_pretrained(file.parent)
        else:
            write_text(file, json.dumps(plan.to_dict(), indent=2, sort_keys=True) + "\n")
        if name in ("orthorank", "orthorank-corrected"):
            self.results["plan_file" if name == "orthorank" else "corrected_plan_file"] = str(file)

    def forget_plans(self) -> None:
        """Remove an earlier run's plans: an interrupted run must not seem to have found them."""
        for name in PLAN_FILES.values():
            file = self.folder / name
            file.unlink(missing_ok=True)
            if file.parent != self.folder and file.parent.is_dir():
                (file.parent / MAPS_NAME).unlink(missing_ok=True)
                with suppress(OSError):  # something else is in there
                    file.parent.rmdir()

    @contextmanager
    def timed(self, step: str) -> Iterator[None]:
        """Note how long a step takes."""
        begin = time.perf_counter()
        yield
        self.results["seconds"][step] = round(time.perf_counter() - begin, 1)
