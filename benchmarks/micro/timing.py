"""How long one call takes, on a CPU by the clock and on a GPU by its own events, with nothing left in the L2 cache."""

import time
from collections.abc import Callable

import torch

Timer = Callable[[], float]


def timer_and_setup(device: torch.device) -> tuple[Timer, Callable[[], None]]:
    """What pytest-benchmark calls before and after a function, and what it calls before both.

    On a GPU the set-up fills the L2 cache with other data. The work is queued behind that, so the time the CPU needs to
    launch a kernel is not measured unless it is longer than the filling.
    """
    if device.type == "cpu":
        return time.perf_counter, lambda: None
    return event_timer(torch.cuda.Event), flush(device)


def event_timer(event: Callable[..., torch.cuda.Event]) -> Timer:
    """A clock whose differences are times between events: it is read in pairs, and waits at the second of each."""
    began: list[torch.cuda.Event] = []

    def read() -> float:
        now = event(enable_timing=True)
        now.record()
        if not began:
            began.append(now)
            return 0.0
        now.synchronize()
        return began.pop().elapsed_time(now) / 1e3

    return read


def flush(device: torch.device) -> Callable[[], None]:
    """Writes twice the L2 cache, and no less than 256 MB: enough work to hide a launch behind."""
    size = max(256 << 20, 2 * torch.cuda.get_device_properties(device).L2_cache_size)
    buffer = torch.empty(size // 4, dtype=torch.int32, device=device)
    return lambda: buffer.zero_() and None


def rounds_for(call: Callable[[], object], timer: Timer, seconds: float = 1.0) -> int:
    """Calls that take about so many seconds together: 5 to 50, found by making two."""
    call()
    began = timer()
    call()
    once = timer() - began
    return max(5, min(50, int(seconds / max(once, 1e-9))))
