"""A whole tuning run, for ``orthorank-kernels tune``: compile many candidates at once, time each as soon as it is
compiled, and write what was found before the next one begins.
"""

import json
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from orthorank_kernels import op as _library
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.settings.lookup import Settings
from orthorank_kernels.tuning import compiling
from orthorank_kernels.tuning import problems as tuning_problems
from orthorank_kernels.tuning import tune as tuning

MOST_WORKERS = 14
ARCHIVE = ".tar"
LINES = "tune.jsonl"
Jobs = Sequence[tuple[str, str]]
Say = Callable[[str], None]


def default_workers() -> int:
    """Processes that compile: a core is left for the one that measures, and one for the rest of the machine."""
    return max(0, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))


def jobs_of(ops: Sequence[str] | None, kinds: Sequence[str] | None) -> list[tuple[str, str]]:
    """The kinds of problems that were asked for, by op; all of them for None.

    Raises:
        tuning.TuningError: there is no such op, or no such kind among the ops; the message lists those there are.
    """
    for op in ops or ():
        if op not in tuning.tunable():
            raise tuning.TuningError(f"op is {op!r}; ops with launch settings are {', '.join(tuning.tunable())}")
    jobs = [(op, kind) for op in ops or tuning.tunable() for kind in _settings.kinds(op)]
    for kind in kinds or ():
        if kind not in (known := [k for _, k in jobs]):
            raise tuning.TuningError(f"kind is {kind!r}; it may be one of {'; '.join(known)}")
    return [(op, kind) for op, kind in jobs if not kinds or kind in kinds]


def measure(jobs: Jobs, device: torch.device, output: Path, *, seconds: float, workers: int, say: Say) -> int:
    """Tune ``jobs`` on ``device``; how many of them were left out because the time was over.

    Args:
        output: a folder of settings, or an archive (``.tar``) of such a folder, which is a whole one at any time. What
            is there already stays, but for the kinds that are measured anew. Each candidate's time is a line of
            ``tune.jsonl`` in it.
        seconds: after which no candidate is begun; workers: processes that compile, 0: this one does.
        say: gets a line for each kind.
    """
    until = time.monotonic() + seconds
    target = _library.launcher("configs.target_of")(device)
    offered = {job: list(tuning.candidates(*job, target)) for job in jobs}
    with _folder_of(output) as (folder, keep), _pool(target, workers, device) as pool:
        waiting = {job: pool.compile(*job, candidates) for job, candidates in offered.items()} if pool else {}
        for number, (op, kind) in enumerate(jobs):
            if time.monotonic() > until:
                return len(jobs) - number
            print(f"[{number + 1}/{len(jobs)}] {op}, {kind}", file=sys.stderr, flush=True)
            candidates, notes = offered[op, kind], folder / LINES

            def note(settings: Settings, took: float | None, job: Any = (op, kind), notes: Path = notes) -> None:
                line = {"gpu": _settings.gpu_name(target), "op": job[0], "kind": job[1]}
                _append(notes, line | {"settings": dict(settings), "milliseconds": took} | tuning.versions())
                keep()

            ready = _compiled(candidates, waiting[op, kind], until, target) if pool else iter(candidates)
            found = tuning.tune(op, kind, device, offered=ready, until=until, on_candidate=note)
            path = tuning.save(op, _settings.gpu_name(target), {kind: found}, folder)
            keep()
            settings = ", ".join(f"{name} {value}" for name, value in sorted(found.settings.items()))
            say(
                f"{op}, {kind}: {found.milliseconds:.3f} ms (default {found.default_milliseconds:.3f} ms; "
                f"{found.candidates} of {len(candidates)} candidates): {settings}"
            )
            say(f"  written to {path if folder == output else output}")
    return 0


def compile_only(jobs: Jobs, target: str, *, seconds: float, workers: int, say: Say) -> int:
    """Compile the candidates of ``jobs`` for ``target``, a GPU that need not be here; how many were left out.

    What compiles lies in Triton's cache afterwards, where a later run with the same Triton finds it.
    """
    until, left = time.monotonic() + seconds, 0
    most = tuning_problems.SHARED_KIB[_settings.family(target)] << 10
    with compiling.pool(target, max(1, workers)) as pool:
        waiting = {job: pool.compile(*job, list(tuning.candidates(*job, target))) for job in jobs}
        for (op, kind), futures in waiting.items():
            found = [_outcome(future, until) for future in futures]
            done = [each for each in found if each is not None]
            left += len(found) - len(done)
            errors = [each.error for each in done if each.error]
            large = sum(each.shared > most for each in done)
            say(
                f"{op}, {kind}: {len(done) - len(errors)} of {len(found)} candidates compiled for {target}"
                + (f", {large} with more shared memory than it has" if large else "")
                + "".join(f"\n  {error}" for error in sorted(set(errors)))
            )
    return left


@contextmanager
def _pool(target: str, workers: int, device: torch.device) -> "Iterator[compiling.Pool | None]":
    if not workers:
        yield None
        return
    with compiling.pool(target, workers, compiling.multiprocessors_of(device)) as pool:
        yield pool


def _compiled(candidates: Sequence[Settings], futures: Sequence[Any], until: float, target: str) -> Iterator[Settings]:
    """The default, then those that compile and whose shared memory the GPU has, as they become ready."""
    most = tuning_problems.SHARED_KIB[_settings.family(target)] << 10
    for number, (settings, future) in enumerate(zip(candidates, futures, strict=True)):
        found = _outcome(future, until)
        if number == 0:
            yield settings
        elif found is None:
            return
        elif found.error is None and found.shared <= most:
            yield settings


def _outcome(future: Any, until: float) -> compiling.Compiled | None:
    try:
        return compiling.outcome(future, None if until == float("inf") else max(0.0, until - time.monotonic()))
    except TimeoutError:
        return None


@contextmanager
def _folder_of(output: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """A folder for files, and what keeps them in ``output``: nothing if it is that folder."""
    if output.suffix != ARCHIVE:
        output.mkdir(parents=True, exist_ok=True)
        yield output, lambda: None
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if output.exists():
            try:
                with tarfile.open(output) as archive:
                    archive.extractall(folder, filter="data")
            except tarfile.TarError as error:
                raise tuning.TuningError(
                    f"output is {str(output)!r}, which is no archive ({error}); name another"
                ) from None
        yield folder, lambda: _pack(folder, output)


def _pack(folder: Path, output: Path) -> None:
    """The files of ``folder`` as an archive, which is a whole one at any time."""
    part = output.with_name(output.name + ".tmp")
    with tarfile.open(part, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.add(file, file.name)
    os.replace(part, output)


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
