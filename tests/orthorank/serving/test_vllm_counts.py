"""Counters of a server, and the line that it logs, without vLLM."""

import itertools
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orthorank import OrthoRankConfig
from orthorank.packed.sinks import SinkBank
from orthorank.serving.vllm import counts as counting
from orthorank.serving.vllm import startup
from orthorank.serving.vllm.backend import Shared
from orthorank.serving.vllm.counts import Counts, totals
from orthorank.serving.vllm.requests import RequestTable
from orthorank.serving.vllm.serving import Serving

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def without_prometheus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(counting.SEVERAL, raising=False)


def test_files_of_several_engines_are_one_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(counting.FOLDER, str(tmp_path))
    first, second = counting.of_this_process(), counting.of_this_process()
    first.add("orthorank_steps", "selected")
    first.add("orthorank_layer_tokens", "dense", 2**40)
    second.add("orthorank_steps", "selected", 4)
    (tmp_path / "begun.counts").touch()  # an engine that is just starting
    found = totals(tmp_path)
    assert found["orthorank_steps", "selected"] == 5
    assert found["orthorank_layer_tokens", "dense"] == 2**40
    assert sum(found.values()) == 5 + 2**40
    assert first.get("orthorank_steps", "selected") == 1
    assert totals(tmp_path / "gone") == dict.fromkeys(found, 0)


@pytest.mark.parametrize("folder", [None, "gone"])
def test_without_a_folder_nobody_reads(folder: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An engine on another node, or one whose front end has ended. Where there was one, that is said."""
    counts = Counts(None if folder is None else tmp_path / folder)
    counts.add("orthorank_steps", "dense")
    assert counts.get("orthorank_steps", "dense") == 1
    assert ("gone is gone, so what this engine counts is on no /metrics" in caplog.text) == (folder is not None)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What `show` registers, with Prometheus's client and at the exit; its folders are ``0``, ``1``, ..."""
    found: list[Any] = []
    fake = SimpleNamespace(REGISTRY=SimpleNamespace(register=found.append))
    monkeypatch.setitem(sys.modules, "prometheus_client", fake)
    monkeypatch.setattr(counting.atexit, "register", lambda *done: found.append(done))
    numbers = itertools.count()

    def made(prefix: str) -> str:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        return str(folder)

    monkeypatch.setattr(counting.tempfile, "mkdtemp", made)
    monkeypatch.setenv(counting.FOLDER, "")  # which `show` sets, so it is put back
    monkeypatch.delenv(counting.FOLDER)
    return found


def shown(monkeypatch: pytest.MonkeyPatch, *, by_vllm: bool = False) -> str:
    """The folder that a process finds or makes, which vLLM started or somebody else."""
    monkeypatch.setattr(counting.multiprocessing, "parent_process", lambda: object() if by_vllm else None)
    counting.show.__wrapped__()
    return os.environ.get(counting.FOLDER, "")


def test_front_ends_share_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: list[Any]) -> None:
    """The first one makes it and removes it; those that it starts find its name. A fork removes nothing."""
    assert shown(monkeypatch) == shown(monkeypatch, by_vllm=True) == str(tmp_path / "0")
    (clear, folder, owner), *collectors = registered
    assert [collector.folder for collector in collectors] == [tmp_path / "0"] * 2
    clear(folder, owner + 1)
    assert folder.is_dir()
    clear(folder, owner)
    assert not folder.exists()
    assert shown(monkeypatch, by_vllm=True) == str(tmp_path / "1"), "nobody can count into one that is gone"
    monkeypatch.delenv(counting.FOLDER)
    assert shown(monkeypatch, by_vllm=True) == str(tmp_path / "2"), "a child of a process that has no engine"


def test_a_server_that_a_front_end_happens_to_start_counts_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registered: list[Any]
) -> None:
    monkeypatch.setenv(counting.FOLDER, str(tmp_path))
    assert shown(monkeypatch) == str(tmp_path / "0")


def test_no_folder_beside_prometheus_own(monkeypatch: pytest.MonkeyPatch, registered: list[Any]) -> None:
    monkeypatch.setenv(counting.SEVERAL, "/somewhere")
    assert shown(monkeypatch) == ""
    assert registered == []


def test_counters_that_are_gone_are_not_0(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    family = SimpleNamespace(CounterMetricFamily=lambda *args, **others: SimpleNamespace(add_metric=lambda *at: None))
    monkeypatch.setitem(sys.modules, "prometheus_client.core", family)
    assert len(list(counting._Collector(tmp_path).collect())) == len(counting.METRICS)
    assert list(counting._Collector(tmp_path / "away").collect()) == []
    assert "away is gone, and with it the counters" in caplog.text


def test_steps_are_counted_in_one_builder_alone() -> None:
    plan = OrthoRankConfig(layers=[1, 2], keep_ratio=0.5, keep_ratios={2: 0.0})
    requests, counts = RequestTable(2), Counts(None)
    requests.add(0, list(range(1, 10)))
    bank = SinkBank(lambda token: torch.zeros(1, 4), 8)
    shared = Shared(Serving(plan), [1], bank, requests, (2,), dense=3, counts=counts)

    def run(tokens: int, end: int, row: int, *, counted: bool = True) -> Any:
        common = SimpleNamespace(
            num_reqs=1,
            query_start_loc_cpu=torch.tensor([0, tokens]),
            seq_lens_cpu_upper_bound=torch.tensor([end]),
            req_idx=torch.tensor([row]).numpy(),
            is_prefilling=None,
        )
        return shared.step(common, CPU, counted=counted)

    assert run(12, 12, 0).prompt_tokens == 9  # a request that is computed again, with three generated tokens
    run(9, 9, 0, counted=False)  # another group of the cache
    run(1, 10, 0)
    run(5, 5, 1)  # of no request: vLLM warms up
    shared.count_layer(9, 4, portable=True)
    shared.count_layer(9, None, portable=False)
    found = {(metric, value): counts.get(metric, value) for metric, value in counting._SLOTS}
    assert {key: count for key, count in found.items() if count} == {
        ("orthorank_steps", "selected"): 1,
        ("orthorank_steps", "none"): 1,
        ("orthorank_layer_tokens", "removed"): 9,
        ("orthorank_layer_tokens", "dense"): 27,
        ("orthorank_layer_tokens_updated", "dense"): 27,
        ("orthorank_layer_tokens", "selecting"): 9,
        ("orthorank_layer_tokens_updated", "selecting"): 4,
        ("orthorank_fallbacks", "portable"): 1,
    }


WINDOW: dict[str, Any] = {"select": "window", "select_window": 64}
THRESHOLD: dict[str, Any] = {"select": "threshold", "thresholds": {2: 0.5, 3: 0.5}}


@pytest.mark.parametrize(
    ("fields", "caching", "said"),
    [
        (WINDOW, True, "; off: chunks that end inside a window and cached blocks that are not of a prompt alone"),
        (WINDOW, False, "window of 64, by 'orthogonal'); off: chunks that end inside a window"),
        (THRESHOLD, True, "; off: cached blocks that are not of a prompt alone"),
        (THRESHOLD, False, "(threshold, below thresholds, by 'orthogonal')"),
        ({"keep_ratios": {3: 0.5}}, False, "2, 3 select 33 % to 50 % of a prompt's tokens (topk, the best of each"),
        (THRESHOLD | {"min_prompt": 256}, False, "by 'orthogonal', prompts of 256 tokens or more)"),
        ({"keep_ratio": 0.0}, True, "OrthoRank: of 6 layers 2, 3 are removed"),
    ],
)
def test_the_line_at_the_start(fields: dict[str, Any], caching: bool, said: str) -> None:
    line = startup.line(Serving(OrthoRankConfig(layers=[2, 3], **fields)), 6, None, caching=caching)
    assert said in line
    if not caching and fields.get("select") != "window":
        assert ("off:" in line) == ("keep_ratios" in fields)


def test_why_attention_is_portable() -> None:
    layer = SimpleNamespace(orthorank_paged=False, orthorank=SimpleNamespace(serving=SimpleNamespace(attention="auto")))
    assert startup.attention_path(layer, "no layout").endswith("a request for each query): no layout")
    layer.orthorank.serving.attention = "portable"
    assert startup.attention_path(layer, None).endswith(": asked for")
    layer.orthorank_paged = True
    assert startup.attention_path(layer, None) == "paged (this package's kernel)"
