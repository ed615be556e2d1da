"""How many calls a benchmark on a CPU takes. A GPU is timed by the campaign: `benchmarks/campaign/measure.py`."""

from collections.abc import Callable


def rounds_for(call: Callable[[], object], timer: Callable[[], float], seconds: float = 1.0) -> int:
    """Calls that take about so many seconds together: 5 to 50, found by making two."""
    call()
    began = timer()
    call()
    once = timer() - began
    return max(5, min(50, int(seconds / max(once, 1e-9))))
