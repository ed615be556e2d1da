"""What ``orthorank vllm-args`` prints is what vLLM reads."""

import json
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from orthorank import OrthoRankConfig
from orthorank.cli import main
from tests.vllm.engines import ask, check, expect, prompts

pytestmark = pytest.mark.vllm
WAYS: dict[str, dict[str, Any]] = {
    "topk": {},
    "window": {"select": "window", "select_window": 64},
    "threshold": {"select": "threshold", "thresholds": {1: 0.5, 2: 0.5}},
}


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["vllm-args", *arguments]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("way", WAYS)
def test_the_parser_of_vllm_reads_the_line(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: str
) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    plan = str(OrthoRankConfig(layers=[1, 2], **WAYS[way]).save_pretrained(tmp_path))
    words = shlex.split(printed(capsys, plan, "--model", str(llama)))
    keywords = json.loads(printed(capsys, plan, "--model", str(llama), "--python"))
    namespace = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(["--model", str(llama), *words])
    read = AsyncEngineArgs.from_cli_args(namespace)
    assert {name: getattr(read, name) for name in keywords} == keywords


def test_an_engine_starts_with_the_keywords(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The window way: the one whose arguments the scheduler checks."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    plan = OrthoRankConfig(layers=[1, 2], **WAYS["window"])
    keywords = json.loads(printed(capsys, str(plan.save_pretrained(tmp_path)), "--model", str(llama), "--python"))
    asked = prompts([30, 200])
    llm: Any = LLM(
        str(llama), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512, **keywords
    )
    try:
        check(ask(llm, asked), expect(llama, {"layers": [1, 2], **WAYS["window"]}, asked))
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def test_the_example_serves_a_plan(llama: Path, tmp_path: Path) -> None:
    """examples/serving.py, with a plan that ranks prompts as a whole."""
    from vllm.distributed import cleanup_dist_env_and_memory

    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "serving.py"))
    plan = OrthoRankConfig(layers=[1, 2]).save_pretrained(tmp_path)
    asked = prompts([30, 200])
    llm = example["engine"](
        str(llama), str(plan), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=512
    )
    try:
        check(ask(llm, asked), expect(llama, {"layers": [1, 2]}, asked))
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()
