"""The CUDA calls of the campaign, in their order, on stand-ins for PyTorch's CUDA objects: no GPU is at hand."""

from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.campaign import cuda


@pytest.fixture
def gpu(monkeypatch):
    """A `cuda.Gpu` whose events and memory note what happens in ``gpu.log``; `tests/orthorank_kernels` test replays."""
    from orthorank_kernels.triton import timing

    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, other: "Event") -> float:
            return 5.0

    class Replay:
        def __init__(self, call: Any, other: Any):
            assert other is flushed
            self.result = call()

        def __call__(self) -> float:
            log.append("replay")
            return 2.0

    flushed = SimpleNamespace(amax=lambda: log.append("flush"))
    found = SimpleNamespace(
        name="A GPU", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )
    fake = SimpleNamespace(
        cuda=SimpleNamespace(
            get_device_properties=lambda index: found,
            synchronize=lambda: log.append("wait"),
            empty_cache=lambda: log.append("empty"),
            reset_peak_memory_stats=lambda: log.append("reset"),
            max_memory_allocated=lambda: 7,
            get_device_capability=lambda: (9, 0),
        ),
        __version__="2.11.0",
        version=SimpleNamespace(cuda="13.0"),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91500)),
    )
    monkeypatch.setattr(cuda, "torch", fake)
    monkeypatch.setattr(cuda, "Event", Event)
    monkeypatch.setattr(timing, "Replay", Replay)
    monkeypatch.setattr(timing, "flushed_by", lambda: flushed)
    return SimpleNamespace(gpu=cuda.Gpu(), log=log)


def test_a_capture_is_the_package_s_replay_in_seconds(gpu):
    result, replay = gpu.gpu.capture(lambda: gpu.log.append("call") or "result")
    assert result == "result"
    assert replay() == 0.002
    assert gpu.log == ["call", "replay"]


def test_an_eager_call_is_between_events_after_a_flush(gpu):
    gpu.gpu.flush()
    assert gpu.gpu.around(lambda: gpu.log.append("call")) == 0.005
    assert gpu.log == ["flush", "event", "call", "event", "wait"]


def test_facts_memory_and_probes(gpu, monkeypatch):
    from tests.ptx import cuda_driver

    facts = gpu.gpu.facts()
    assert (facts["gpu"], facts["GiB"], facts["L2 MiB"], facts["capability"]) == ("A GPU", 80, 50, "9.0")
    gpu.gpu.free()
    assert gpu.log[-2:] == ["empty", "reset"]
    assert gpu.gpu.peak() == 7
    monkeypatch.setattr(cuda_driver, "assemble", lambda known, architecture: (len(known), architecture))
    monkeypatch.setattr(cuda_driver, "Gpu", lambda code: SimpleNamespace(run=code))
    old, new = SimpleNamespace(targets=(80,)), SimpleNamespace(targets=(80, 90))
    assert gpu.gpu.probes([old, new]) == ([new], (1, "sm_90a"))
