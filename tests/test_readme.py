"""The README is true: its figures are those of the committed results, its code runs."""

import doctest
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_figures_are_those_of_the_committed_results() -> None:
    run = subprocess.run(
        [sys.executable, "benchmarks/readme.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_what_it_says_of_the_shipped_plans_is_in_a_committed_file() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "shipped_smollm2.json").read_text())
    values = {row["name"]: row["perplexity"] for row in found["rows"]}
    ratio = found["log_ratio"]
    text = " ".join((ROOT / "docs" / "results.md").read_text().split())
    assert (
        f"layer pruning has a perplexity of {values['layer pruning']:.1f} there and OrthoRank "
        f"{values['orthorank']:.1f}: level with pruning"
    ) in text
    assert f"(log ratio {ratio['mean']:.3f} ± {ratio['standard_error']:.3f};" in text
    assert abs(ratio["mean"]) < 2 * ratio["standard_error"], "level: within two standard errors"
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo" / "results.json").read_text())
    assert found["text_sha256"] == demo["text_info"]["sha256"], "of the table's text"


def test_what_it_says_of_retrieval_is_in_a_committed_file() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "retrieval_smollm2.json").read_text())
    scores = {row["name"]: row["score"] for row in found["prompts"]["key-value"]["rows"]}
    text = " ".join((ROOT / "README.md").read_text().split())
    four, nine = scores["four layers at a third"], scores["nine layers at a third"]
    assert f"SmolLM2 found {four:.0f} % of what the dense model finds with four layers that select" in text
    assert f"and {nine:.0f} % with nine" in text


def test_the_bounds_on_the_speed_up_are_those_of_the_flops() -> None:
    from transformers import LlamaConfig, MistralConfig

    from orthorank.evaluation import flop_speedup

    text = " ".join((ROOT / "README.md").read_text().split())
    llama2, llama3 = (LlamaConfig(num_key_value_heads=n, intermediate_size=m) for n, m in ((32, 11008), (8, 14336)))
    llama3.vocab_size = 128256
    bounds = [f"{flop_speedup(c, 2048, range(20, 29), 1 / 3):.2f}" for c in (llama2, llama3, MistralConfig())]
    assert bounds == ["1.19", "1.22", "1.22"]
    assert f"{bounds[0]} times faster on a Llama-2-7B, and {bounds[1]} times on a Llama-3-8B or Mistral-7B" in text


def test_the_install_lines_work_before_the_package_is_on_an_index() -> None:
    """On every page, and in every error: they name a checkout. The extras that they name are there."""
    sources = [*(ROOT / "orthorank").rglob("*.py"), *(ROOT / "orthorank_kernels").rglob("*.py")]
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    named: set[str] = set()
    for page in [*pages, *sources]:
        text = page.read_text(encoding="utf-8")
        assert re.findall(r"pip install [^\n`]*orthorank-kernels\[[^\n]*", text) == [], page
        named.update(re.findall(r"install\([\"'](\w+)[\"']", text) if page in sources else [])
        named.update(*(found.split(",") for found in re.findall(r"pip install '\.\[([\w,]+)\]'", text)))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"demo", "eval", "plot", "vllm", "triton", "hf"} <= named <= set(extras)


def blocks() -> list[tuple[str, str]]:
    """Language and text of every code block."""
    return re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.slow
def test_the_first_example_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    at = next(number for number, (_, text) in enumerate(blocks()) if "load_model" in text)
    exec(blocks()[at][1], {})
    assert capsys.readouterr().out == blocks()[at + 1][1]


def test_it_is_short_enough_to_be_read() -> None:
    """About a thousand words beside tables and code."""
    text = re.sub(
        r"```.*?```|^\|.*?$|<!--.*?-->|\]\([^)]*\)",
        "",
        (ROOT / "README.md").read_text(),
        flags=re.DOTALL | re.MULTILINE,
    )
    assert 600 < len(text.split()) < 1200


def test_the_kernels_example_runs() -> None:
    example = next(text for _, text in blocks() if "from orthorank_kernels import" in text)
    names: dict[str, object] = {}
    exec(example, names)
    assert names["out"].shape == (1, 4, 85, 16)  # type: ignore[attr-defined]


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "CONTRIBUTING.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).exists(), target


def test_what_an_index_shows_has_no_relative_link() -> None:
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert doctest.testmod(module).failed == 0
    shown = module.with_absolute_links((ROOT / "README.md").read_text(), "https://host/me/it")
    links = re.findall(r"\]\(([^)]+)\)", shown)
    assert len(links) > 20
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_the_test_command_is_the_one_ci_calls() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    assert "\nmake test" in (ROOT / "README.md").read_text()
