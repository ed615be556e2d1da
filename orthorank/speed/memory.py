"""Peak memory of a piece of work, where the machine can tell."""

import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _REFERENCES = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory_meter(device: torch.device) -> str | None:
    """What measures memory on ``device``, in words; None where nothing does."""
    if device.type == "cuda":
        return "CUDA allocator"
    if device.type == "cpu" and _STATUS.is_file() and _REFERENCES.is_file():
        return "resident set of the process"
    return None


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that were held at most while ``run`` ran, what was there before included; None if nothing measures that.

    On a GPU this is what PyTorch's allocator handed out. On a CPU under Linux it is the largest resident set of the
    process, weights and libraries included, so that differences between two runs say more than the figure itself.

    Example:
        >>> peak = peak_bytes(lambda: torch.ones(4_000_000), torch.device("cpu"))
        >>> peak is None or peak > 16_000_000
        True
    """
    meter = memory_meter(device)
    if meter is None:
        return None
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    try:
        _REFERENCES.write_text("5", encoding="ascii")  # the kernel forgets the peak so far
    except OSError:  # some containers do not allow it
        return None
    run()
    for line in _STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
