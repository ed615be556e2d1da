"""How much memory a search may take: windows in one forward, and bytes of states that are kept."""

import os
from pathlib import Path
from typing import Any

import torch

from orthorank.common.errors import OrthoRankError

TOKENS_AT_ONCE = {"cpu": 1024}  # more gain nothing on a CPU, and stay out of its caches
TOKENS_AT_ONCE_ELSEWHERE = 32768
_STATES, _FORWARD = 0.25, 0.1  # shares of the free memory
_UNKNOWN = 2**31  # free bytes where nothing tells


def free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on ``device``, in bytes, as far as the system tells.

    >>> free_bytes(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(_available_in_system(), _available_in_group())


def states_budget(device: torch.device) -> int:
    """Bytes of states that a search keeps unless told otherwise: a quarter of the free memory."""
    return int(_STATES * free_bytes(device))


def windows_at_once(config: Any, windows: int, tokens: int, device: torch.device, element_size: int) -> int:
    """Windows in one forward unless told otherwise.

    As many as take a tenth of the free memory, at most what the device makes faster, and at most a quarter of all, so
    that a bad plan can be given up after a quarter of the work.

    Args:
        config: the model's; windows, tokens: of the calibration; element_size: bytes of one value of a state.
    """
    text = config.get_text_config()
    width = 8 * text.hidden_size + 3 * getattr(text, "intermediate_size", 4 * text.hidden_size)
    each = tokens * width * element_size
    if getattr(text, "_attn_implementation", None) == "eager":
        each += 3 * 4 * text.num_attention_heads * tokens * tokens
    fitting = int(_FORWARD * free_bytes(device)) // each
    fast = TOKENS_AT_ONCE.get(device.type, TOKENS_AT_ONCE_ELSEWHERE) // tokens
    return max(1, min(fitting, fast, -(-windows // 4)))


def check_bytes(name: str, value: int | None) -> None:
    """``value`` is a number of bytes or None.

    Raises:
        OrthoRankError: it is not; ``name`` is the argument's.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise OrthoRankError(
            f"{name} is {value!r}; it must be a number of bytes, 0 (keep nothing) or more, or None for a "
            "quarter of the free memory"
        )


def _available_in_system(meminfo: Path = Path("/proc/meminfo")) -> int:
    try:
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return _UNKNOWN


def _available_in_group(group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves (cgroup version 2); without one, more than any machine has."""
    try:
        return max(0, int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return 2**63
