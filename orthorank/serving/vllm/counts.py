"""What a server has done so far, as counters on its ``/metrics``.

The model runs in processes of vLLM's engine, ``/metrics`` is answered by the process of its front end. So the front end
makes a folder and names it to its children (`show`), the first rank of each engine counts into a small file there
(`Counts`), and whoever asks for the front end's metrics reads all files of the folder.

Prometheus has the like (``PROMETHEUS_MULTIPROC_DIR``), which vLLM switches on where it starts several front ends; then
nothing is collected but what its client writes there, so these counters are the client's own.
"""

import atexit
import logging
import mmap
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

LOGGER = logging.getLogger("vllm.orthorank")  # vLLM gives its own loggers alone a place to write to
FOLDER = "ORTHORANK_COUNTS"  # of the files; set for the processes that a front end starts
SEVERAL = "PROMETHEUS_MULTIPROC_DIR"


class Metric(NamedTuple):
    """A counter: what it counts, and the values of its one label."""

    name: str
    says: str
    label: str
    values: tuple[str, ...]


KINDS = ("selecting", "removed", "dense")
METRICS = (
    Metric(
        "orthorank_layer_tokens",
        "Tokens of prompts that are selected from, once for each layer: those that selecting layers ranked, and those "
        "that came to removed and to dense layers.",
        "layers",
        KINDS,
    ),
    Metric("orthorank_layer_tokens_updated", "How many of these the layers updated.", "layers", KINDS),
    Metric(
        "orthorank_steps",
        "Steps of the engine: some prompt was selected from, all prompts were computed in every layer, or tokens were "
        "generated alone.",
        "prompts",
        ("selected", "dense", "none"),
    ),
    Metric(
        "orthorank_fallbacks",
        "Selecting layers, once for each step, whose queries attended by the kernel of vLLM's attention backend, one "
        "request each, and not by this package's.",
        "to",
        ("portable",),
    ),
)
_SLOTS = [(metric.name, value) for metric in METRICS for value in metric.values]
_SLOT = {key: number for number, key in enumerate(_SLOTS)}


class Counts:
    """Counters of one engine, added to by one process.

    Args:
        folder: where others read them; None: nobody does.

    Example:
        >>> counts = Counts(None)
        >>> counts.add("orthorank_steps", "selected")
        >>> counts.get("orthorank_steps", "selected")
        1
    """

    def __init__(self, folder: Path | None) -> None:
        self._client: dict[str, Any] = {}
        self._slots = np.zeros(len(_SLOTS), dtype=np.int64)
        if os.environ.get(SEVERAL) is not None:
            self._client = _clients()
        elif folder is not None and folder.is_dir():
            handle, name = tempfile.mkstemp(suffix=".counts", prefix=f"{os.getpid()}-", dir=folder)
            os.truncate(name, self._slots.nbytes)
            with os.fdopen(handle, "r+b") as file:
                self._slots = np.frombuffer(mmap.mmap(file.fileno(), self._slots.nbytes), dtype=np.int64)
        elif folder is not None:
            LOGGER.warning("orthorank: %s is gone, so what this engine counts is on no /metrics", folder)

    def add(self, metric: str, value: str, count: int = 1) -> None:
        """Count. Aligned words of 8 bytes are written as a whole, so a reader sees the old number or the new one."""
        self._slots[_SLOT[metric, value]] += count
        if self._client and count:
            self._client[metric].labels(value).inc(count)

    def get(self, metric: str, value: str) -> int:
        """What was counted here."""
        return int(self._slots[_SLOT[metric, value]])


def of_this_process() -> Counts:
    """Counters that go where the front end looks."""
    folder = os.environ.get(FOLDER)
    return Counts(None if folder is None else Path(folder))


def totals(folder: Path) -> dict[tuple[str, str], int]:
    """The sums over all engines that count, or counted, into ``folder``."""
    sums = np.zeros(len(_SLOTS), dtype=np.int64)
    for file in folder.glob("*.counts"):
        found = np.frombuffer(file.read_bytes(), dtype=np.int64)
        if found.size == sums.size:  # else its engine makes it right now
            sums += found
    return dict(zip(_SLOTS, sums.tolist(), strict=True))


@cache
def show() -> None:
    """In a front end: what its engines count is part of its metrics. Before it starts them."""
    if os.environ.get(SEVERAL) is not None:
        return  # Prometheus's client reads what engines write there, and no collector
    from prometheus_client import REGISTRY

    # Its own children share a front end's folder. A server that its process happens to start inherits the name as well.
    found = os.environ.get(FOLDER)
    if found is None or multiprocessing.parent_process() is None or not Path(found).is_dir():
        folder = tempfile.mkdtemp(prefix="orthorank-")
        atexit.register(_clear, Path(folder), os.getpid())
        os.environ[FOLDER] = folder
    REGISTRY.register(_Collector(Path(os.environ[FOLDER])))


def _clear(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # not in a fork
        shutil.rmtree(folder, ignore_errors=True)


class _Collector:
    """What Prometheus's client asks whenever it is asked itself."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def collect(self) -> Iterator[Any]:
        """All counters, those that are 0 too; none where nobody knows what they are."""
        from prometheus_client.core import CounterMetricFamily

        if not self.folder.is_dir():
            LOGGER.warning("orthorank: %s is gone, and with it the counters: start the server again", self.folder)
            return
        found = totals(self.folder)
        for metric in METRICS:
            family = CounterMetricFamily(metric.name, metric.says, labels=[metric.label])
            for value in metric.values:
                family.add_metric([value], found[metric.name, value])
            yield family


@cache
def _clients() -> dict[str, Any]:
    """Counters of Prometheus's client, in a process whose client writes into `SEVERAL`."""
    from prometheus_client import CollectorRegistry, Counter, values

    registry = CollectorRegistry()  # of its own: nobody asks this process
    before = values.ValueClass
    if before is values.MutexValue:  # as in a fork of a front end that imported the client before it knew of `SEVERAL`
        values.ValueClass = values.get_value_class()
    try:
        found = {m.name: Counter(m.name, m.says, [m.label], registry=registry) for m in METRICS}
        for metric in METRICS:
            for value in metric.values:
                found[metric.name].labels(value)  # which shows it as 0
    finally:
        values.ValueClass = before
    return found
