"""Servers in processes of their own: what they are started with, how they are ended, what they are asked."""

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

from tests.vllm.engines import settings
from tests.vllm.jobs import ROOT

SERVER = ("-m", "vllm.entrypoints.openai.api_server")


def server_arguments(folder: Path, plan: dict[str, Any]) -> list[str]:
    """Of a server of the tiny models that ranks whole prompts."""
    chosen = settings(folder, plan)
    return [
        *["--model", str(folder), "--hf-overrides", json.dumps(chosen["hf_overrides"]), "--skip-tokenizer-init"],
        *["--dtype", "float32", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "4"],
        *["--max-num-batched-tokens", "2048", "--block-size", "32", "--host", "127.0.0.1"],
        *["--no-enable-prefix-caching", "--no-enable-chunked-prefill"],
    ]


@contextmanager
def running(*arguments: str, log: Path | None = None, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process and all that it starts, ended together; what they write goes to ``log``."""
    written = subprocess.DEVNULL if log is None else log.open("wb")
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment,
        start_new_session=True,
        stdout=written,
        stderr=subprocess.STDOUT,
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


def wait_until_healthy(port: int, server: subprocess.Popen[bytes], seconds: float = 400) -> None:
    """Until it answers."""
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


def complete(port: int, model: str, prompt: list[int], **others: Any) -> list[int]:
    """The greedy tokens after ``prompt``."""
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True}
    given = post(port, "v1/completions", body | {"return_token_ids": True} | others)
    tokens: list[int] = given["choices"][0]["token_ids"]
    return tokens


def post(port: int, path: str, body: dict[str, Any]) -> Any:
    """What the server answers, as JSON."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())
