"""The parent of a campaign: it survives every child, and whatever happens there is a table of what was measured.

It imports neither torch nor Triton. What a step measures is written by its children themselves, line by line; the
parent adds a line for how each of them ended.
"""

import json
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.campaign import lines, machine, plan, tables
from benchmarks.campaign.job import Job
from benchmarks.campaign.plan import Child, Step
from benchmarks.campaign.processes import Running, Tail

ROOT = Path(__file__).resolve().parents[2]
LOST = 75  # exit code of a child whose GPU context is lost: it can be started again for what it has not measured
MOST_BYTES = 15 << 20  # of a file that comes back
MARGIN = 4.0  # seconds between the time that a child is told and its limit
STARTS = 3  # of one child
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Stopped(Exception):
    """The campaign was asked to stop; the argument is the signal's name."""


@dataclass(frozen=True)
class Options:
    """Args:
    name: of the campaign; steps: what it does; output: folder of the results.
    seconds: when it stops itself; machine: folder in which campaigns on this machine leave their lines for later ones.
    earlier: whether the output begins with the lines of earlier campaigns.
    patience: how many seconds one second of all limits is.
    """

    name: str
    steps: Sequence[Step]
    output: Path
    seconds: float
    machine: Path
    dry: bool = False
    earlier: bool = False
    patience: float = 1.0
    python: str = sys.executable


class Parent:
    """Runs the steps of one campaign."""

    def __init__(self, options: Options, clock: Callable[[], float] = time.monotonic):
        self.options, self.clock, self.began = options, clock, clock()
        options.output.mkdir(parents=True, exist_ok=True)
        self.results, self.log = options.output / "results.jsonl", options.output / "log.txt"
        self.work = Path(tempfile.mkdtemp(prefix="campaign-"))
        self.files = self.work / "files"
        self.files.mkdir()
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *python_path()])}
        self.running: list[tuple[Child, Running, Tail, Tail | None]] = []
        self.failed = False
        self.stop: str | None = None  # the signal that asks to stop
        self.outputs = [self.results, *machine.leave_in(options.machine, options.name)]
        common = {"campaign": options.name, "gpu": "unknown", **machine.versions(), "commit": machine.commit(ROOT)}
        self.lines = lines.Lines(self.outputs, {**common, "date": time.strftime("%Y-%m-%d"), "dry": options.dry})
        if options.earlier:
            for path in machine.earlier(options.machine, self.outputs[1:]):
                lines.append(self.results, path.read_bytes())

    def left(self) -> float:
        """Seconds until the campaign stops itself."""
        return self.options.seconds - (self.clock() - self.began) / self.options.patience

    def run(self) -> int:
        """All steps, then the table. 0: every child ended well; 1: one did not; 130: it was stopped by a signal."""
        before = {number: signal.signal(number, self.heard) for number in SIGNALS}
        code = 130
        try:
            steps = list(self.options.steps)
            for number, step in enumerate(steps):
                self.begin(step, plan.cuts(steps[number:], self.left()))
            code = int(self.failed)
        except Stopped as reason:
            self.lines.write(step="campaign", status="stopped", note=f"by {reason} {self.left():.0f} s before its end")
        finally:
            self.finish()
            for number, handler in before.items():
                signal.signal(number, handler)
        return code

    def heard(self, number: int, frame: Any) -> None:
        """A signal that asks to stop. It is noted: an exception at any place could lose a process or a line."""
        self.stop = self.stop or signal.Signals(number).name

    def begin(self, step: Step, cuts: Sequence[str]) -> None:
        """One step, or a line that says why not."""
        if self.stop:
            raise Stopped(self.stop)
        seconds = min(step.shortened(cuts), self.left())
        if seconds < min(plan.LEAST, step.seconds):
            self.lines.write(step=step.name, status="left out", note=f"late: {max(0.0, self.left()):.0f} s were left")
            return
        if used := [cut for cut in cuts if cut in step.saves]:
            self.lines.write(step=step.name, status="shortened", note=f"late: without {', '.join(used)}")
        print(f"{step.name}: {step.what}, {seconds:.0f} s at most", flush=True)
        patience = self.options.patience
        end = self.clock() + seconds * patience
        for child in step.children:
            self.start(step, child, min(child.seconds or seconds, seconds) * patience, cuts)
        starts = dict.fromkeys((child.name for child in step.children), 1)
        while self.running:
            time.sleep(0.02)
            for entry in [entry for entry in self.running if entry[1].poll()]:
                self.running.remove(entry)
                child, left = entry[0], end - self.clock()
                again = entry[1].ended == f"exit {LOST}" and starts[child.name] < STARTS and left > plan.LEAST
                self.ended(step, *entry, again=again)
                if again:
                    starts[child.name] += 1
                    self.start(step, child, left, cuts)
            self.gather(step)
            if self.stop:
                raise Stopped(self.stop)
        self.write_table()

    def start(self, step: Step, child: Child, seconds: float, cuts: Sequence[str]) -> None:
        """Start one child, in its own group and folder."""
        work = self.work / f"{step.name}-{child.name.replace(' ', '-')}"
        work.mkdir(exist_ok=True)
        told = max(1.0, seconds - min(MARGIN, seconds / 4))
        common = {**self.lines.common, "step": step.name}
        outputs = [str(path) for path in self.outputs]
        job = Job(outputs, str(self.files), str(work), told, list(cuts), self.options.dry, common)
        given = child.dry if self.options.dry and child.dry is not None else child.command
        filled = {"{job}": job.text(), "{work}": str(work), "{files}": str(self.files), "{seconds}": f"{told:.0f}",
                  "{python}": self.options.python}  # fmt: skip
        command = [fill(word, filled) for word in given]
        if not child.program or given is child.dry:
            command = [self.options.python, *command]
        tail = Tail(work / child.lines_from) if child.lines_from else None
        try:
            environment = {**self.environment, **child.environment}
            running = Running(child.name, command, work / "output.txt", seconds, environment, ROOT)
        except OSError as error:  # the program is not there
            self.lines.write(step=step.name, child=child.name, status="left out", note=f"cannot be started: {error}")
            return
        self.running.append((child, running, Tail(work / "output.txt"), tail))

    def gather(self, step: Step) -> None:
        """What running children said goes to the log, and their lines to the results."""
        for child, _, output, tail in self.running:
            self.take(step, child, output, tail)

    def take(self, step: Step, child: Child, output: Tail, tail: Tail | None) -> None:
        if said := output.new():
            with self.log.open("ab") as file:
                file.write(said)
        for text in (tail.new(whole_lines=True) if tail else b"").splitlines():
            try:
                found = json.loads(text)
            except ValueError:
                found = {"note": text.decode(errors="replace")}
            self.lines.write(step=step.name, child=child.name, kind="test", **{"status": "ok", **found})

    def ended(
        self, step: Step, child: Child, running: Running, output: Tail, tail: Tail | None, again: bool = False
    ) -> None:
        """A line for how a child ended, and what follows from it for later steps."""
        self.take(step, child, output, tail)
        status, note = running.ended, ""
        if status == "exit 2" and child.refuses:
            status, note = "left out", running.said()
        elif status != "ok":
            status, note = "failed", f"{status}; {running.said()}"
            self.failed = True
        fields: dict[str, Any] = {"child": child.name, "seconds": round(running.seconds, 2), "status": status}
        self.lines.write(step=step.name, kind="end", **fields, **({"note": note} if note else {}))
        if again:
            self.lines.write(step=step.name, child=child.name, status="started again", note="for what is not measured")
        if status == "failed" and child.off:
            self.environment.update(child.off)
            how = ", ".join(f"{name}={value}" for name, value in child.off.items())
            self.lines.write(step=step.name, child=child.name, status="switched off", note=f"{how} for all later steps")
        known = {line.get("gpu", "unknown") for line in lines.read(self.results)} - {"unknown"}
        self.lines.common |= {"gpu": known.pop()} if known else {}

    def finish(self) -> None:
        """End what still runs, keep what it wrote, write the table."""
        for child, running, output, tail in self.running:
            running.kill()
            self.take(Step("stopped", 0, "", []), child, output, tail)
        self.pack()
        trim(self.log)
        print(self.write_table())
        shutil.rmtree(self.work, ignore_errors=True)

    def pack(self) -> None:
        """The files of the steps, one archive; what is too large for it stays behind, and a line says so."""
        archive, size = self.options.output / f"files-{self.options.name.lower()}.tar", 0
        found = sorted(path for path in self.files.rglob("*") if path.is_file())
        if not found:
            return
        with tarfile.open(archive, "w") as file:
            for path in found:
                size += path.stat().st_size + 2048  # its headers
                if size > MOST_BYTES:
                    size -= path.stat().st_size
                    self.lines.write(step="campaign", status="left out", note=f"{path.name} is too large to return")
                    continue
                file.add(path, str(path.relative_to(self.files)))

    def write_table(self) -> str:
        """``table.md`` of everything that is in the results by now."""
        text = tables.markdown(lines.read(self.results))
        path = self.options.output / "table.md"
        path.with_suffix(".tmp").write_text(text, encoding="utf-8")
        os.replace(path.with_suffix(".tmp"), path)
        return text


def fill(word: str, filled: dict[str, str]) -> str:
    for name, value in filled.items():
        word = word.replace(name, value)
    return word


def python_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]


def trim(log: Path) -> None:
    """A log that is too large to come back keeps its beginning and its end."""
    if log.exists() and log.stat().st_size > MOST_BYTES:
        text = log.read_bytes()
        log.write_bytes(text[: 1 << 20] + b"\n[...]\n" + text[-(MOST_BYTES - (2 << 20)) :])
