"""What an evaluator has: memory, the hidden states that are kept in it, and the processes that share the windows."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

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


class Processes(Protocol):
    """What a group of processes must offer. Every process holds the same windows, plan and state.

    Args:
        rank: this process, counted from 0; size: how many there are.
    """

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def gather(self, values: list[float]) -> list[list[float]]:
        """The lists of all processes in the order of their ranks, on every process; lengths may differ.

        Every process calls it the same number of times, in the same order.
        """


T = TypeVar("T")


class Group(Processes, Protocol):
    """What the search as a whole needs beside what the evaluator does."""

    def share(self, value: T) -> T:
        """Rank 0's value, on every process."""

    def collect(self, value: T) -> list[T]:
        """The values of all processes in the order of their ranks, on every process."""

    def add(self, tensor: Tensor) -> None:
        """Make ``tensor`` the sum of those of all processes, in place."""


class OneProcess:
    """A group of one: what is used without a launcher.

    Example:
        >>> OneProcess().gather([1.0, 2.0])
        [[1.0, 2.0]]
    """

    rank = 0
    size = 1

    def gather(self, values: list[float]) -> list[list[float]]:
        """A list that holds ``values`` alone."""
        return [list(values)]

    def share(self, value: T) -> T:
        """``value``."""
        return value

    def collect(self, value: T) -> list[T]:
        """A list of ``value``."""
        return [value]

    def add(self, tensor: Tensor) -> None:
        """Nothing to add."""


def launched_rank() -> int:
    """This process's rank as its launcher wrote it down, 0 without one."""
    try:
        return int(os.environ.get("RANK", "0")) if _launched_size() > 1 else 0
    except ValueError:
        return 0


def local_device(device: str) -> str:
    """``device``, with the number of this process's own GPU where ``"auto"`` or ``"cuda"`` leaves it open."""
    if _launched_size() < 2 or device not in ("auto", "cuda") or not torch.cuda.is_available():
        return device
    own = int(os.environ.get("LOCAL_RANK", "0"))
    if own >= torch.cuda.device_count():
        raise OrthoRankError(
            f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs; start as many "
            "processes as GPUs, or give --device cpu"
        )
    return f"cuda:{own}"


@contextmanager
def joined() -> Iterator[Group]:
    """The group of the launched processes within the block, or this process alone.

    A default group that is there already is used, and left as it is.

    Raises:
        OrthoRankError: the launcher's environment is incomplete, or the other processes cannot be reached.
    """
    from torch import distributed

    there = distributed.is_available() and distributed.is_initialized()
    if not there and _launched_size() < 2:
        yield OneProcess()
        return
    from orthorank.stack.launched import Launched, connect

    if not there:
        connect()
    try:
        yield Launched()
    finally:
        if not there:
            distributed.destroy_process_group()


def together(group: Group, work: Callable[[], T]) -> T:
    """Do ``work`` on every process; where it fails on one it fails on all, with the same sentence.

    Without this the others would wait for the failed one.
    """
    value: T | None = None
    problem: str | None = None
    try:
        value = work()
    except OrthoRankError as error:
        problem = str(error)
    if problems := [other for other in group.collect(problem) if other is not None]:
        raise OrthoRankError(problems[0])
    return value  # type: ignore[return-value] # work has returned, or there is a problem


def _launched_size() -> int:
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1


Ratios = tuple[float, ...]


class States:
    """The kept states of one batch of windows, by the part of a plan that they depend on, within a budget of bytes.

    The state at the input of layer l depends on the ratios of the layers below l alone: its *prefix*. A question about
    a plan starts from the longest prefix that is kept. States of the current plan itself, the *trunk*, serve every
    question that changes one layer; states of a plan that differs from it in one layer, the *branches*, serve the next
    round, for as long as it switches a layer further up. What does not fit is not kept, and so computed again.

    Args:
        budget: bytes that may be held.

    Example:
        >>> import torch
        >>> states = States(budget=32)
        >>> states.offer((1.0,), torch.zeros(4))
        >>> states.offer((1.0, 0.5), torch.ones(4))
        >>> layer, state = states.longest((1.0, 0.5, 1.0))
        >>> layer, state.tolist(), states.bytes
        (2, [1.0, 1.0, 1.0, 1.0], 32)
    """

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.bytes = 0
        self._kept: OrderedDict[Ratios, Tensor] = OrderedDict()  # the least recently used first
        self._plan: Ratios = ()
        self._base = -1

    def follow(self, plan: Ratios, base: int) -> None:
        """Make ``plan`` the current one; the state at the input of layer ``base`` is the last to be given up.

        States that no plan with one change to ``plan`` can use are dropped.
        """
        self._plan, self._base = plan, base
        for prefix in [prefix for prefix in self._kept if self._changes(prefix) > 1]:
            self._drop(prefix)

    def longest(self, ratios: Ratios) -> tuple[int, Tensor] | None:
        """The state kept for most layers of ``ratios``, and the layer whose input it is; None: nothing is kept."""
        longest = max(map(len, self._kept), default=0)
        for layer in range(min(longest, len(ratios)), -1, -1):
            if ratios[:layer] in self._kept:
                self._kept.move_to_end(ratios[:layer])
                return layer, self._kept[ratios[:layer]]
        return None

    def offer(self, prefix: Ratios, state: Tensor) -> None:
        """Keep ``state``, the input of layer ``len(prefix)``, if there is room or it is worth more than what is kept.

        A branch takes free room only: all branches are used once a round, so that giving up one for another would in
        the end keep none. The trunk's states take the room of branches, then that of the one used longest ago.
        """
        if prefix in self._kept:
            return
        if state.untyped_storage().nbytes() > _bytes(state):
            state = state.clone()  # a view would hold more than it shows
        if self._changes(prefix) == 0:
            self._make_room(_bytes(state))
        if self.bytes + _bytes(state) <= self.budget:
            self._kept[prefix] = state
            self.bytes += _bytes(state)

    def _make_room(self, needed: int) -> None:
        if needed > self.budget:
            return
        branches = [prefix for prefix in self._kept if self._changes(prefix)]
        trunk = [prefix for prefix in self._kept if not self._changes(prefix) and len(prefix) != self._base]
        for prefix in branches + trunk:
            if self.bytes + needed <= self.budget:
                return
            self._drop(prefix)

    def _drop(self, prefix: Ratios) -> None:
        self.bytes -= _bytes(self._kept.pop(prefix))

    def _changes(self, prefix: Ratios) -> int:
        """In how many layers ``prefix`` differs from the current plan."""
        return sum(a != b for a, b in zip(prefix, self._plan, strict=False))


def _bytes(state: Tensor) -> int:
    return state.numel() * state.element_size()
