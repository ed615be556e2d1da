"""The CUDA calls of the campaign, in their order, on stand-ins for PyTorch's CUDA objects: no GPU is at hand."""

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.campaign import cuda


@pytest.fixture
def gpu(monkeypatch):
    """A `cuda.Gpu` whose events, streams and graphs note what happens; ``gpu.log`` is that."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool, external: bool = False):
            assert enable_timing
            self.external = external

        def record(self) -> None:
            log.append(f"{'external' if self.external else 'event'} {current[-1]}")

        def elapsed_time(self, other: "Event") -> float:
            if self.external and broken:
                raise RuntimeError("invalid resource handle")
            return 2.0 if self.external else 5.0

    class Graph:
        def replay(self) -> None:
            log.append("replay")

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("join")

    @contextlib.contextmanager
    def inside(name: str):
        current.append(name)
        yield
        current.pop()

    current, broken = ["eager"], []
    other = SimpleNamespace(amax=lambda: log.append(f"flush {current[-1]}"))
    found = SimpleNamespace(
        name="A GPU", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20
    )
    fake = SimpleNamespace(
        cuda=SimpleNamespace(
            get_device_properties=lambda index: found,
            synchronize=lambda: log.append("wait"),
            Stream=Stream,
            CUDAGraph=Graph,
            current_stream=Stream,
            stream=lambda stream: inside("side"),
            graph=lambda graph: inside("graph"),
            empty_cache=lambda: log.append("empty"),
            reset_peak_memory_stats=lambda: log.append("reset"),
            max_memory_allocated=lambda: 7,
            get_device_capability=lambda: (9, 0),
        ),
        zeros=lambda size, dtype, device: SimpleNamespace(size=size, device=device, amax=other.amax),
        int32=torch.int32,
        __version__="2.11.0",
        version=SimpleNamespace(cuda="13.0"),
        backends=SimpleNamespace(cudnn=SimpleNamespace(version=lambda: 91500)),
    )
    monkeypatch.setattr(cuda, "torch", fake)
    monkeypatch.setattr(cuda, "Event", Event)
    made = cuda.Gpu()
    return SimpleNamespace(gpu=made, log=log, current=current, broken=broken)


def test_a_capture_times_the_call_alone_after_a_flush(gpu):
    result, replay = gpu.gpu.capture(lambda: gpu.log.append(f"call {gpu.current[-1]}") or "result")
    assert result == "result"
    assert gpu.log == [
        "join", "call side", "call side", "join", "flush graph", "external graph", "call graph", "external graph",
    ]  # fmt: skip
    gpu.log.clear()
    assert replay() == 0.002
    assert gpu.log == ["event eager", "replay", "event eager", "wait"]


def test_where_graphs_have_no_times_the_flush_is_taken_off(gpu):
    _, replay = gpu.gpu.capture(lambda: None)
    gpu.broken.append(True)
    assert replay() == pytest.approx(0.0)  # both take the 5 ms that every pair of events says here
    assert gpu.gpu.flushing == 0.005
    gpu.log.clear()
    replay()
    assert "flush eager" not in gpu.log, "measured once"


def test_facts_memory_and_probes(gpu, monkeypatch):
    from tests.ptx import cuda_driver

    facts = gpu.gpu.facts()
    assert (facts["gpu"], facts["GiB"], facts["L2 MiB"], facts["capability"]) == ("A GPU", 80, 50, "9.0")
    assert gpu.gpu.other.size * 4 == 256 << 20
    gpu.gpu.free()
    assert gpu.log[-2:] == ["empty", "reset"]
    assert gpu.gpu.peak() == 7
    monkeypatch.setattr(cuda_driver, "assemble", lambda known, architecture: (len(known), architecture))
    monkeypatch.setattr(cuda_driver, "Gpu", lambda code: SimpleNamespace(run=code))
    old, new = SimpleNamespace(targets=(80,)), SimpleNamespace(targets=(80, 90))
    assert gpu.gpu.probes([old, new]) == ([new], (1, "sm_90a"))
