"""What a server says of itself: a line when it starts, counters on its /metrics."""

import re
import urllib.request
from pathlib import Path

import pytest

from orthorank.serving.vllm import counts
from tests.vllm.engines import PLAN, expect, prompts
from tests.vllm.servers import SERVER, complete, running, server_arguments, wait_until_healthy

pytestmark = pytest.mark.vllm
REMOVED = PLAN | {"keep_ratios": {"3": 0.0}, "layers": [1, 2, 3]}
WAYS = [1, 2, "Prometheus's own"]


@pytest.mark.parametrize("way", WAYS)
def test_a_server_counts_once(tmp_path: Path, llama: Path, way: int | str) -> None:
    """The engine is in a process of its own, with two ranks each of them; they all compute the same.

    The last way is that of several front ends: all processes count into files of Prometheus's client.
    """
    ranks = 2 if way == 2 else 1
    asked, port, log = prompts([90, 40]), 18420 + ranks, tmp_path / "log"
    arguments = [*server_arguments(llama, REMOVED), "--tensor-parallel-size", str(ranks), "--port", str(port)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1" if ranks == 2 else "0"
    if isinstance(way, str):
        (tmp_path / "prometheus").mkdir()
        environment["PROMETHEUS_MULTIPROC_DIR"] = str(tmp_path / "prometheus")
    with running(*SERVER, *arguments, log=log, **environment) as server:
        wait_until_healthy(port, server)
        assert set(_counters(port).values()) == {0}
        wanted = [answer.tokens for answer in expect(llama, REMOVED, asked)]
        assert [complete(port, str(llama), prompt) for prompt in asked] == wanted
        found = _counters(port)
    updated = 2 * (90 // 3 + 40 // 3)  # two layers
    assert found == {
        'orthorank_layer_tokens_total{layers="selecting"}': 2 * 130,
        'orthorank_layer_tokens_total{layers="removed"}': 130,
        'orthorank_layer_tokens_total{layers="dense"}': 130,
        'orthorank_layer_tokens_updated_total{layers="selecting"}': updated,
        'orthorank_layer_tokens_updated_total{layers="removed"}': 0,
        'orthorank_layer_tokens_updated_total{layers="dense"}': 130,
        'orthorank_steps_total{prompts="selected"}': 2,
        'orthorank_steps_total{prompts="dense"}': 0,
        'orthorank_steps_total{prompts="none"}': 10,  # six tokens of each answer, the first of them with the prompt
        'orthorank_fallbacks_total{to="portable"}': 2 * 2,
    }
    said = re.findall(r"OrthoRank: .*", log.read_text(errors="replace"))
    assert len(said) == 1, said
    assert said[0].startswith("OrthoRank: of 4 layers 1, 2 select 33 % of a prompt's tokens (topk, the best of each ")
    assert "3 is removed; attention: portable (the backend's kernel, a request for each query): the backend" in said[0]
    assert said[0].endswith("off: chunked prefill and prefix caching, as a prompt is ranked as a whole")


def test_an_engine_that_is_a_fork_of_a_front_end_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which had imported Prometheus's client before vLLM told it, by the environment, of several front ends."""
    from prometheus_client import CollectorRegistry, multiprocess, values

    assert values.ValueClass is values.MutexValue
    monkeypatch.setenv(counts.SEVERAL, str(tmp_path))
    monkeypatch.setattr(counts, "_clients", counts._clients.__wrapped__)
    counts.Counts(None).add("orthorank_steps", "selected", 3)
    assert values.ValueClass is values.MutexValue
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)
    assert registry.get_sample_value("orthorank_steps_total", {"prompts": "selected"}) == 3


def _counters(port: int) -> dict[str, float]:
    """This package's, by name and label."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    return {line.split(" ")[0]: float(line.split(" ")[1]) for line in lines if line.startswith("orthorank_")}
