"""Jobs for engines in processes of their own (`tests.vllm.run`), and what such a process reads from its environment."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.vllm.engines import Answer

ROOT = Path(__file__).parents[2]
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
SECOND = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}  # the second model runner


def compiled_by(compiler: str, folder: Path) -> dict[str, str]:
    """``"dynamo"`` or ``"inductor"``; what is compiled is kept in ``folder``."""
    environment = {"VLLM_CACHE_ROOT": str(folder / "cache")}
    return environment | ({"VLLM_CPU_CI_ENV": "1"} if compiler == "dynamo" else {})


def answers(
    tmp_path: Path, chosen: dict[str, Any], asked: list[list[int]], environment: dict[str, str]
) -> list[Answer]:
    """What an engine with these settings answers to all prompts at once."""
    return [Answer(*answer) for answer in run_job(tmp_path, {"settings": chosen, "prompts": asked}, environment)]


def run_job(tmp_path: Path, asked: dict[str, Any], environment: dict[str, str]) -> list[Any]:
    """What the job gives; ``asked`` as `tests.vllm.run` says."""
    job = tmp_path / "job.json"
    job.write_text(json.dumps(asked))
    process = subprocess.run(
        [sys.executable, "-m", "tests.vllm.run", str(job)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    answered: list[Any] = json.loads(Path(f"{job}.out").read_text())
    return answered
