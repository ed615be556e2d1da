"""How one call is timed: checked first, then as a replayed graph with a cold cache, and as an eager call beside it."""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.campaign.dry import tensors
from benchmarks.campaign.job import Job
from benchmarks.campaign.lines import Lines, read
from benchmarks.campaign.sizes import Sizes
from benchmarks.campaign.summary import spread
from benchmarks.micro.workload import LeftOut

STEADY = 0.02  # of the median, between the quartiles
LEAST, MOST = 20, 2000  # replays
FEWEST = 3  # of a call so long that its time is over after them
Call = Callable[[], Any]
Checked = tuple[Call, Callable[[Any], None]]  # a call, and what raises AssertionError unless its result is right
KEY = ("op", "shape", "provider", "mode")


class Lost(Exception):
    """The GPU context is lost: nothing can be measured in this process any more."""


@dataclass
class Context:
    """What a step works with."""

    machine: Any
    job: Job
    lines: Lines
    sizes: Sizes
    began: float = field(default_factory=time.monotonic)
    strict: bool = False  # whether what fails, and not only what is wrong, makes the process fail

    def __post_init__(self) -> None:
        earlier = read(self.job.results)
        step = self.lines.common.get("step")
        own = [line for line in earlier if line.get("step") == step and line.get("campaign") == self.campaign]
        self.done = {tuple(line.get(name) for name in KEY) for line in own if "op" in line}
        self.ceilings = {line["what"]: float(line["rate"]) for line in earlier if line.get("kind") == "ceiling"}
        self.planned, self.begun = 1, 0

    @property
    def campaign(self) -> Any:
        return self.lines.common.get("campaign")

    def left(self) -> float:
        """Seconds until this process should have ended."""
        return self.job.seconds - (time.monotonic() - self.began)

    def share(self) -> float:
        """Seconds that the next of ``planned`` measurements may take, so that the last one has its time, too."""
        waiting = max(1, self.planned - self.begun)
        return min(self.sizes.measurement, max(0.1, 1.5 * self.left() / waiting))

    def cut(self, *words: str) -> str | None:
        """The word among ``words`` that is left out because the campaign is late."""
        return next((word for word in words if word in self.job.cuts), None)

    @contextmanager
    def guard(self, **fields: Any) -> Iterator[None]:
        """What fails inside is a line, and its memory is free again; a lost GPU raises `Lost`."""
        well = False
        try:
            yield
            well = True
        except LeftOut as reason:
            self.lines.write(status="left out", note=str(reason), **fields)
        except Exception as error:
            wrong = isinstance(error, AssertionError)
            self.lines.write(
                status="wrong" if wrong else "failed", note=str(error) if wrong else words(error), **fields
            )
            forget(error)
        if not well:
            gc.collect()
        try:
            self.machine.free()
            self.machine.wait()
        except RuntimeError as error:
            raise Lost(str(error)) from error


def forget(error: BaseException | None) -> None:
    """Empty the frames of an error and of those before it: they hold the tensors of what failed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def words(error: BaseException) -> str:
    """An error in a line: its text, and the place in our code or a library that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    place = f" ({frame.filename.rsplit('/', 1)[-1]}:{frame.lineno})" if frame else ""
    text = str(error)
    text = text if len(text) <= 700 else f"{text[:350]} [...] {text[-350:]}"  # the cause may stand at either end
    return f"{type(error).__name__}: {text}{place}"


def poison(result: Any) -> None:
    """Fill what a call returned with NaN or the largest integers, so that what is not written is seen."""
    for x in tensors(result):
        x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)


def repeated(takes: Sequence[Callable[[], float]], seconds: float) -> list[float]:
    """Times of calls in turn, at least `LEAST` until they are steady or ``seconds`` are spent."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while len(found) < MOST:
        found.append(takes[len(found) % len(takes)]())
        late = time.monotonic() > end
        if (late and len(found) >= FEWEST) or (len(found) >= LEAST and spread(found) < STEADY):
            break
    return found


def figures(found: Sequence[float], amount: float, unit: str, ceiling: float | None) -> dict[str, Any]:
    """A line's figures: median, spread, rate, and its share of the ceiling that was measured in the same run."""
    median = statistics.median(found)
    scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[unit]
    rate = amount / max(median, 1e-9) / scale
    return {
        "kind": "time", "median_us": median * 1e6, "spread": spread(list(found)), "n": len(found), "unit": unit,
        "amount": amount, "rate": rate, "ceiling": ceiling, "share": rate / ceiling if ceiling else None,
    }  # fmt: skip


def measure(
    context: Context,
    calls: Sequence[Checked],
    *,
    amount: float,
    unit: str,
    modes: Sequence[str] = ("replay", "eager"),
    **fields: Any,
) -> None:
    """Time calls that do the same on different inputs, in turn; what is wrong has no number.

    ``fields`` (op, shape, provider) name the measurement. Two untimed calls come first, since cuDNN plans at one.
    """
    context.begun += 1
    wanted = [mode for mode in modes if tuple({**fields, "mode": mode}.get(name) for name in KEY) not in context.done]
    if not wanted:
        return
    if context.left() <= 0:
        context.lines.write(status="left out", note="late", **fields)
        return
    ceiling = context.ceilings.get("copy" if unit == "GB/s" else "product")
    seconds = context.share()
    with context.guard(**fields):
        for call, check in calls:
            check(call())
            call()
        if "eager" in wanted:
            host: list[float] = []
            found = repeated([eager(context.machine, call, host) for call, _ in calls], seconds / 4)
            context.lines.write(
                mode="eager", **fields, **figures(found, amount, unit, ceiling), host_us=statistics.median(host) * 1e6
            )
        if "replay" in wanted:
            found = replayed(context.machine, calls, seconds)
            context.lines.write(mode="replay", **fields, **figures(found, amount, unit, ceiling))


def replayed(machine: Any, calls: Sequence[Checked], seconds: float) -> list[float]:
    """Times of the captured calls in turn, each checked after its outputs were poisoned. Holds nothing afterwards."""
    captured = [machine.capture(call) for call, _ in calls]
    for (result, replay), (_, check) in zip(captured, calls, strict=True):
        poison(result)
        replay()
        check(result)
    return repeated([replay for _, replay in captured], seconds)


def eager(machine: Any, call: Call, host: list[float]) -> Callable[[], float]:
    """An eager call with a cold cache; the host's time for it is added to ``host``."""

    def watched() -> None:
        began = time.perf_counter()
        call()
        host.append(time.perf_counter() - began)

    def run() -> float:
        machine.flush()
        machine.wait()  # else the flush would hide a part of the host's time
        return float(machine.around(watched))

    return run


def warm(machine: Any, seconds: float, size: int) -> None:
    """Products for so many seconds, so that clocks are where they stay."""
    a = torch.randn(size, size, device=machine.device).to(machine.dtype)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        torch.mm(a, a)
        machine.wait()
