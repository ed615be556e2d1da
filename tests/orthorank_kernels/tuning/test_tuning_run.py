"""A tuning run: compiled in processes without a GPU, timed in order, written at once, as a folder or an archive."""

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from orthorank_kernels import cli
from orthorank_kernels import op as _library
from orthorank_kernels.settings import lookup as _settings
from orthorank_kernels.tuning import compiling
from orthorank_kernels.tuning import problems as tuning_problems
from orthorank_kernels.tuning import run as tuning_run
from orthorank_kernels.tuning import tune as tuning
from tests.orthorank_kernels.tuning.test_tuning import CPU, GPU, KIND, OP, ROOT, Clock

triton = pytest.importorskip("triton")
ROWS = ("gather_rows", "rows of 4096 bytes")


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ORTHORANK_CONFIG_DIR", str(tmp_path / "user"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    _settings.forget()
    yield
    _settings.forget()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A GPU as far as tuning can see, on which fewer warps are faster."""
    found = Clock(lambda s: 1.0 + s["num_warps"])
    parts = {
        "configs.target_of": lambda device: GPU,
        "configs._multiprocessors": lambda device: 7,
        "timing.milliseconds": found,
    }
    monkeypatch.setattr(_library, "launcher", lambda path: parts[path])
    monkeypatch.setattr(tuning.tuning_problems, "problem", lambda op, kind, device: None)
    monkeypatch.setattr(tuning, "check_gpu", lambda device: None)
    return found


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_each_candidate_is_a_line_before_the_next_is_timed(clock: Clock, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    kept: list[int] = []
    cost = clock.cost

    def watched(settings: Any) -> float:
        kept.append(len(lines((folder / tuning_run.LINES).read_text())) if (folder / tuning_run.LINES).exists() else 0)
        return cost(settings)

    clock.cost = watched
    said: list[str] = []
    left = tuning_run.measure([(OP, KIND)], CPU, folder, seconds=1e9, workers=0, say=said.append)
    offered = list(tuning.candidates(OP, KIND, GPU))
    assert left == 0
    assert kept == list(range(len(offered)))
    found = lines((folder / tuning_run.LINES).read_text())
    assert [line["settings"] for line in found] == [dict(c) for c in offered]
    assert found[0] | {"gpu": "NVIDIA Test 90", "op": OP, "kind": KIND, "milliseconds": 9.0} == found[0]
    assert found[0]["triton"] == triton.__version__
    assert f"{len(offered)} of {len(offered)} candidates" in said[0]
    content = json.loads((folder / _settings.file_name(OP, "NVIDIA Test 90")).read_text())
    assert content["milliseconds"][KIND] == {"tuned": 5.0, "default": 9.0, "candidates": len(offered)}


def test_when_the_time_is_over_what_was_timed_is_kept(clock: Clock, tmp_path: Path) -> None:
    offered = list(tuning.candidates(OP, KIND, GPU))
    tuned = tuning.tune(OP, KIND, CPU, until=time.monotonic() - 1)
    assert (tuned.candidates, tuned.settings) == (1, offered[0]), "the default alone"
    kinds = _settings.kinds(OP)[:3]
    jobs = [(OP, kind) for kind in kinds]

    def slow(settings: Any) -> float:
        time.sleep(0.3)  # the time is over while the first candidate is timed
        return 1.0

    clock.cost = slow
    left = tuning_run.measure(jobs, CPU, tmp_path / "out", seconds=0.2, workers=0, say=lambda line: None)
    assert left == 2
    assert list(_settings.read(tmp_path / "out" / _settings.file_name(OP, "NVIDIA Test 90"), OP)) == kinds[:1]
    arguments = ["tune", "--op", OP, "--seconds", "0", "--workers", "0", "--output", str(tmp_path / "none")]
    assert cli.main(arguments) == 0


def test_one_archive_has_everything_and_is_added_to(clock: Clock, tmp_path: Path) -> None:
    archive = tmp_path / "new" / "settings.tar"
    for kind in _settings.kinds(OP)[:2]:
        arguments = ["tune", "--op", OP, "--kind", kind, "--workers", "0", "--output", str(archive)]
        assert cli.main(arguments) == 0
    assert [path.name for path in archive.parent.iterdir()] == [archive.name], "no temporary file stays"
    with tarfile.open(archive) as found:
        found.extractall(tmp_path / "unpacked", filter="data")
    name = _settings.file_name(OP, "NVIDIA Test 90")
    assert sorted(path.name for path in (tmp_path / "unpacked").iterdir()) == [name, tuning_run.LINES]
    assert list(_settings.read(tmp_path / "unpacked" / name, OP)) == sorted(_settings.kinds(OP)[:2])


def test_an_archive_that_is_none_is_left_alone(clock: Clock, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "notes.tar"
    file.write_text("notes")
    assert cli.main(["tune", "--op", OP, "--workers", "0", "--output", str(file)]) == 2
    assert f"output is {str(file)!r}, which is no archive" in capsys.readouterr().err
    assert file.read_text() == "notes"


def test_candidates_are_compiled_without_a_gpu_and_found_by_the_next_process(capsys: Any, tmp_path: Path) -> None:
    op, kind = ROWS
    arguments = ["tune", "--op", op, "--kind", kind, "--compile", "sm_90", "--workers", "1"]
    offered = list(tuning.candidates(op, kind, "sm_90"))
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{op}, {kind}: {len(offered)} of {len(offered)} candidates compiled for sm_90\n"
    compiled = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.cubin")}
    assert 1 < len(compiled) <= len(offered), "settings may come to the same kernel"
    assert cli.main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.cubin")} == compiled


def test_a_run_times_what_compiled_and_leaves_out_the_rest(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default, then of the candidates those that the compiling processes had no complaint about."""
    good = [dict(c) for c in tuning.candidates(*ROWS, GPU)][:2]
    wrong = {"bytes": 64}  # no number of warps: the launch fails
    monkeypatch.setattr(tuning, "candidates", lambda *job: iter([good[0], wrong, good[1]]))
    clock.kind = ROWS[1]
    asked: list[Any] = []

    def measured(run: Any) -> tuple[torch.Tensor, float]:
        asked.append(dict(_settings.look_up(*ROWS, GPU)))
        return torch.ones(3), 1.0

    parts = {"timing.milliseconds": measured, "configs.target_of": lambda device: GPU}
    parts["configs._multiprocessors"] = lambda device: 7
    monkeypatch.setattr(_library, "launcher", lambda path: parts[path])
    assert tuning_run.measure([ROWS], CPU, tmp_path / "out", seconds=1e9, workers=1, say=lambda line: None) == 0
    assert asked == good


def test_what_does_not_compile_or_wants_too_much_is_no_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    outcomes = {
        "a": compiling.Compiled(error="no"),
        "b": compiling.Compiled(1, 100),
        "c": compiling.Compiled(1, 300 << 10),
        "d": compiling.Compiled(1, 227 << 10),
        "e": None,
        "f": compiling.Compiled(1, 1),
    }
    monkeypatch.setattr(tuning_run, "_outcome", lambda future, until: outcomes[future])
    names = list(outcomes)
    assert list(tuning_run._compiled(names, names, 1e9, "sm_90 H100")) == ["a", "b", "d"], "until one is not ready"


def test_a_process_that_dies_is_said() -> None:
    with compiling.pool("sm_90", 1) as pool:
        future = pool.executor.submit(os._exit, 3)
        assert "died" in (compiling.outcome(future).error or "")


KEYS = """
import json, sys
from orthorank_kernels.tuning import compiling
from orthorank_kernels.tuning import problems as tuning_problems
from tests.orthorank_kernels.fake_gpu import fake_gpus, noted_keys
import torch

jobs, how = json.loads(sys.argv[1]), sys.argv[2]
with noted_keys("sm_90") as keys:
    if how == "compile":
        compiling._begin("sm_90", 132)
    for op, kind in jobs:
        if how == "launch":
            with fake_gpus("sm_90", note=False):
                tuning_problems.PROBLEMS[op].run(kind, tuning_problems.Blank(torch.device("cuda", 0)))()
        else:
            tuning_problems.PROBLEMS[op].run(kind, tuning_problems.Blank(torch.device("cpu")))()
print(json.dumps(keys))
"""


def test_what_is_compiled_is_what_is_launched() -> None:
    """The same keys of Triton's cache for CPU tensors in a compiling process as for a GPU's tensors in a launch."""
    jobs = [(OP, KIND), ("select_tokens", "short rows")]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = []
    for how in ("launch", "compile"):
        run = subprocess.run(
            [sys.executable, "-c", KEYS, json.dumps(jobs), how],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr
        found.append(json.loads(run.stdout))
    assert found[0] == found[1]
    assert len({name for name, _ in found[0]}) >= len(jobs)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--compile", "h100"], "compile is 'h100'; it may be an architecture such as sm_80, sm_90 or gfx942"),
        (
            ["--compile", "sm_77"],
            "compile is 'sm_77', which Triton's ptxas does not know (ptxas fatal   : Value 'sm_77'",
        ),
        (["--seconds", "-1"], "seconds is -1.0; it must be 0 or more"),
        (["--workers", "-1"], "workers is -1; it must be 0 or more"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], sentence: str, capsys: Any) -> None:
    assert cli.main(["tune", "--op", OP, *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_blank_tensors_are_those_of_the_problem() -> None:
    blank = tuning_problems.Blank(CPU)
    assert blank.floats(2, 3).shape == (2, 3)
    assert blank.positions(2, 3, 9).tolist() == [[0, 1, 2]] * 2


class FakeCuda:
    """Notes what a capture and its replays ask a GPU for."""

    def __init__(self, external: bool = True, readable: bool = True):
        self.external, self.readable, self.said, self.now = external, readable, [], 0.0
        self.Event, self.CUDAGraph = self.event, lambda: types.SimpleNamespace(steps=[], replay=None)

    def event(self, enable_timing: bool, **options: bool) -> Any:
        if options and not self.external:
            raise TypeError("external")
        event = types.SimpleNamespace(at=0.0)
        name = "graph's event" if options else "event"

        def record() -> None:
            event.at = self.now
            self.said.append(name)

        def elapsed_time(end: Any) -> float:
            if options and not self.readable:
                raise RuntimeError("invalid resource handle")
            return end.at - event.at

        event.record, event.elapsed_time = record, elapsed_time
        return event

    def graph(self, graph: Any, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local", "another thread may allocate meanwhile"
        cuda = self

        class Capture:
            def __enter__(self) -> None:
                self.begin = len(cuda.said)

            def __exit__(self, *error: object) -> None:
                steps = cuda.said[self.begin :]
                graph.replay = lambda: cuda.run(steps)

        return Capture()

    def run(self, steps: list[str]) -> None:
        self.now += 5.0 + 2.0 * steps.count("call")
        self.said.append("replay of " + ", ".join(steps))

    def get_device_properties(self, index: int) -> Any:
        return types.SimpleNamespace(L2_cache_size=1)

    current_device = staticmethod(lambda: 0)
    synchronize = staticmethod(lambda: None)

    def current_stream(self) -> Any:
        return types.SimpleNamespace(wait_stream=lambda other: None)

    Stream = current_stream

    def stream(self, side: Any) -> Any:
        return contextlib.nullcontext()

    device_of = stream


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeCuda]:
    from orthorank_kernels.triton import timing

    def use(**options: bool) -> FakeCuda:
        cuda = FakeCuda(**options)
        zeros = types.SimpleNamespace(amax=lambda: cuda.said.append("flush"))
        monkeypatch.setattr(timing, "cuda", cuda)
        monkeypatch.setattr(timing, "torch", types.SimpleNamespace(zeros=lambda *a, **k: zeros, int32=None))
        return cuda

    return use


def test_a_replay_is_flush_event_call_event(fake: Any) -> None:
    from orthorank_kernels.triton import timing

    cuda = fake()
    timing.Replay(lambda: cuda.said.append("call") or torch.ones(1))()
    assert cuda.said == ["call", "call", "flush", "graph's event", "call", "graph's event",
                         "replay of flush, graph's event, call, graph's event"]  # fmt: skip


def test_without_events_in_graphs_a_graph_without_the_call_is_subtracted(fake: Any) -> None:
    from orthorank_kernels.triton import timing

    cuda = fake(external=False)
    result, took = timing.milliseconds(lambda: cuda.said.append("call") or torch.ones(1), seconds=0.0)
    assert took == 2.0
    assert torch.equal(result, torch.ones(1))
    assert cuda.said.count("replay of flush, call") == cuda.said.count("replay of flush") == timing.LEAST


def test_where_events_in_graphs_cannot_be_read_a_graph_without_the_call_is_subtracted(fake: Any) -> None:
    from orthorank_kernels.triton import timing

    cuda = fake(readable=False)
    replay = timing.Replay(lambda: cuda.said.append("call"))
    assert [replay(), replay()] == [2.0, 2.0]
    assert cuda.said.count("replay of flush") == 2
    assert cuda.said.count("replay of flush, graph's event, call, graph's event") == 3, "the first one had no time"


def test_a_flush_reads_memory_that_is_given(fake: Any) -> None:
    from orthorank_kernels.triton import timing

    cuda = fake()
    timing.Replay(lambda: None, types.SimpleNamespace(amax=lambda: cuda.said.append("other")))()
    assert cuda.said == ["other", "graph's event", "graph's event", "replay of other, graph's event, graph's event"]


def test_what_cannot_be_launched_or_captured_has_no_time(fake: Any) -> None:
    from triton.runtime.errors import OutOfResources

    from orthorank_kernels.triton import timing

    fake()

    def too_large() -> torch.Tensor:
        raise OutOfResources(300, 227, "shared memory")

    assert timing.milliseconds(too_large) == (None, float("inf"))


def test_times_are_taken_until_they_are_steady_or_the_time_is_over() -> None:
    from orthorank_kernels.triton import timing

    values = iter([1.0, 2.0] * 15 + [1.0] * 200)
    found = timing.repeated(lambda: next(values), 1e9)
    assert len(found) > timing.LEAST
    assert timing.spread(found) < timing.STEADY
    assert len(timing.repeated(iter(range(1, 9999)).__next__, 0.0)) == timing.LEAST
    assert len(timing.repeated(iter(range(1, 9999)).__next__, 1e9)) == timing.MOST
