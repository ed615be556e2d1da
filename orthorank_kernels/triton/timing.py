"""The time of a call on a GPU, for tuning and for benchmarks: replays of a CUDA graph, with a cold L2 cache.

A short kernel takes less time than Python needs to launch it, so what is timed is no call of Python's: one graph holds
[flush, event, call, event], and its replay asks nothing of the host between the events.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import cuda
from triton.errors import TritonError

LEAST, MOST = 20, 2000  # replays
STEADY = 0.02  # range between the quartiles, as a share of the median
SECONDS = 0.15  # for one candidate
MEBIBYTE = 1 << 20


def milliseconds(run: Callable[[], torch.Tensor], seconds: float = SECONDS) -> tuple[torch.Tensor | None, float]:
    """The result of ``run`` and its median time; (None, inf) if the GPU cannot launch it.

    Args:
        run: a call that asks the host for nothing; it is timed where its result is.
        seconds: after which no replay begins, though the times are not steady yet; but for `LEAST` of them.

    Returns:
        What a replay wrote, copied, and milliseconds.
    """
    try:
        first = run()
        with cuda.device_of(first):  # events and graphs belong to the current GPU
            replay = Replay(run)
            times = repeated(replay, seconds)
            return replay.result.clone(), statistics.median(times)
    except (TritonError, RuntimeError):  # it does not compile, or wants more shared memory or registers than there are
        return None, float("inf")


class Replay:
    """``run`` captured; calling it replays and gives milliseconds. ``result`` is what a replay writes to.

    Args:
        run: asks the host for nothing.
        other: what the flush reads, larger than the L2 cache; None: memory of its own.
    """

    def __init__(self, run: Callable[[], Any], other: torch.Tensor | None = None) -> None:
        self.other = flushed_by() if other is None else other
        self.around = self._events(external=False)
        self.events = self.empty = None
        with contextlib.suppress(TypeError):  # PyTorch before 2.7 has no events inside graphs
            self.events = self._events(external=True)
        self._warm_up(run)
        self.graph, self.result = self._captured(run)

    def __call__(self) -> float:
        if self.events is not None:
            self.graph.replay()
            cuda.synchronize()
            begin, end = self.events
            try:
                return begin.elapsed_time(end)
            except RuntimeError:  # no times inside graphs here
                self.events = None
        if self.empty is None:
            self.empty, _ = self._captured(None)
        return max(0.0, self._whole(self.graph) - self._whole(self.empty))

    def _events(self, external: bool) -> tuple[cuda.Event, cuda.Event]:
        options = {"external": True} if external else {}
        return tuple(cuda.Event(enable_timing=True, **options) for _ in range(2))

    def _warm_up(self, run: Callable[[], Any]) -> None:
        """Twice beside the current stream, as a capture will be: what is set up once is not captured."""
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(2):
                run()
        cuda.current_stream().wait_stream(side)

    def _captured(self, run: Callable[[], Any] | None) -> tuple[cuda.CUDAGraph, Any]:
        graph, result = cuda.CUDAGraph(), None
        with cuda.graph(graph, capture_error_mode="thread_local"):
            self.other.amax()  # reads: then the cache holds nothing of ours, and nothing that must be written back
            if run is not None:
                if self.events:
                    self.events[0].record()
                result = run()
                if self.events:
                    self.events[1].record()
        return graph, result

    def _whole(self, graph: cuda.CUDAGraph) -> float:
        begin, end = self.around
        begin.record()
        graph.replay()
        end.record()
        cuda.synchronize()
        return begin.elapsed_time(end)


def flushed_by() -> torch.Tensor:
    """What a flush reads on the current GPU: four times its L2 cache, 256 MB at least."""
    size = max(256 * MEBIBYTE, 4 * cuda.get_device_properties(cuda.current_device()).L2_cache_size)
    return torch.zeros(size // 4, dtype=torch.int32, device="cuda")


def repeated(take: Callable[[], float], seconds: float) -> list[float]:
    """Times, at least `LEAST`, until they are steady or ``seconds`` are spent.

    >>> repeated(lambda: 1.0, 1.0) == [1.0] * LEAST
    True
    """
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < LEAST or (len(found) < MOST and time.monotonic() < end and spread(found) >= STEADY):
        found.append(take())
    return found


def spread(times: Sequence[float]) -> float:
    """The range between the quartiles, as a share of the median.

    >>> spread([1.0, 2.0, 3.0, 4.0, 5.0])
    0.6666666666666666
    """
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return (high - low) / max(median, 1e-9)
