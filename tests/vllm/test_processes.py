"""Engines in processes of their own: compiled, the second model runner, tensor parallel, a server, two nodes."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.vllm.engines import PLAN, WHOLE_PROMPTS, WINDOW, Answer, check, expect, prompts, settings

pytestmark = pytest.mark.vllm
LENGTHS = [7, 30, 64, 200]
ROOT = Path(__file__).parents[2]
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def _answers(
    tmp_path: Path, chosen: dict[str, Any], asked: list[list[int]], environment: dict[str, str]
) -> list[Answer]:
    job = tmp_path / "job.json"
    job.write_text(json.dumps({"settings": chosen, "prompts": asked}))
    process = subprocess.run(
        [sys.executable, "-m", "tests.vllm.run", str(job)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    return [Answer(*answer) for answer in json.loads(Path(f"{job}.out").read_text())]


@pytest.mark.parametrize("compiler", ["dynamo", "inductor"])
def test_compiled(tmp_path: Path, llama: Path, compiler: str) -> None:
    """The selecting layers are operators at which the compiled graph is split."""
    chosen = settings(llama, PLAN, **WHOLE_PROMPTS, enforce_eager=False)
    environment = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}
    if compiler == "dynamo":
        environment["VLLM_CPU_CI_ENV"] = "1"
    check(_answers(tmp_path, chosen, prompts(LENGTHS), environment), expect(llama, PLAN, prompts(LENGTHS)))


@pytest.mark.parametrize("plan", [PLAN, WINDOW], ids=["topk", "window"])
def test_second_model_runner(tmp_path: Path, llama: Path, plan: dict[str, Any]) -> None:
    """The one that GPUs run: its kernels in Triton's interpreter."""
    others = WHOLE_PROMPTS if plan is PLAN else {"enable_prefix_caching": False, "max_num_batched_tokens": 100}
    environment = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
    asked = prompts([7, 30, 64, 110])
    check(_answers(tmp_path, settings(llama, plan, **others), asked, environment), expect(llama, plan, asked))


@pytest.mark.parametrize("scores", ["own", "first rank"])
def test_tensor_parallel(tmp_path: Path, llama: Path, scores: str) -> None:
    """Two ranks under vLLM's own executor."""
    chosen = settings(llama, {"plan": PLAN, "scores": scores}, **WHOLE_PROMPTS, tensor_parallel_size=2)
    check(_answers(tmp_path, chosen, prompts(LENGTHS), TWO_RANKS), expect(llama, PLAN, prompts(LENGTHS)))


@pytest.mark.parametrize("cache", ["auto", "fp8"])
def test_bfloat16_runs(tmp_path: Path, llama: Path, cache: str) -> None:
    """Rounding flips tokens at the border of a selection, so results are near, not the same."""
    chosen = settings(llama, PLAN, **WHOLE_PROMPTS) | {"dtype": "bfloat16", "kv_cache_dtype": cache}
    found = _answers(tmp_path, chosen, prompts(LENGTHS), {})
    wanted = expect(llama, PLAN, prompts(LENGTHS))
    pairs = [(a, b) for f, w in zip(found, wanted, strict=True) for a, b in zip(f.prompt, w.prompt, strict=True)]
    assert sum(abs(a - b) for a, b in pairs) / len(pairs) < (0.1 if cache == "auto" else 0.3)


def test_server(llama: Path) -> None:
    """vLLM's OpenAI server, told of the plan by its arguments alone."""
    (asked,), port = prompts([90]), 18411
    arguments = [*_arguments(llama, PLAN), "--port", str(port)]
    with _running("-m", "vllm.entrypoints.openai.api_server", *arguments) as server:
        _wait_until_healthy(port, server)
        assert _complete(port, str(llama), asked) == expect(llama, PLAN, [asked])[0].tokens


def test_two_nodes(llama: Path) -> None:
    """Two nodes on this machine, one rank each, over TCP."""
    (asked,), port = prompts([90]), 18413
    nodes = ["--tensor-parallel-size", "2", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "29633"]
    arguments = [*_arguments(llama, PLAN), *nodes, "--distributed-executor-backend", "mp", "--port", str(port)]
    second = ["-m", "tests.vllm.serve", *arguments, "--node-rank", "1", "--headless"]
    loopback = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        _running(*second, VLLM_CPU_OMP_THREADS_BIND="1", **loopback),
        _running(
            *["-m", "vllm.entrypoints.openai.api_server", *arguments, "--node-rank", "0"],
            VLLM_CPU_OMP_THREADS_BIND="0",
            **loopback,
        ) as first,
    ):
        _wait_until_healthy(port, first)
        assert _complete(port, str(llama), asked) == expect(llama, PLAN, [asked])[0].tokens


def _arguments(folder: Path, plan: dict[str, Any]) -> list[str]:
    chosen = settings(folder, plan)
    return [
        *["--model", str(folder), "--hf-overrides", json.dumps(chosen["hf_overrides"]), "--skip-tokenizer-init"],
        *["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"],
        *["--max-num-batched-tokens", "2048", "--block-size", "32", "--host", "127.0.0.1"],
        *["--no-enable-prefix-caching", "--no-enable-chunked-prefill"],
    ]


@contextmanager
def _running(*arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process and all that it starts, ended together."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        for sent, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
            if process.poll() is None:
                os.killpg(process.pid, sent)
                try:
                    process.wait(seconds)
                except subprocess.TimeoutExpired:
                    continue
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _wait_until_healthy(port: int, server: subprocess.Popen[bytes], seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, "the server ended before it answered"
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
        except OSError:
            time.sleep(1)
        else:
            return
    raise AssertionError(f"no answer in {seconds} s")


def _complete(port: int, model: str, prompt: list[int]) -> list[int]:
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    body |= {"return_token_ids": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["choices"][0]["token_ids"]
