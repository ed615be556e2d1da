"""What the steps of the GPU campaign do when a result is wrong, fails, is late, or a kernel is switched off."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.campaign import child, dry, kernels, lines, measure, plan, sizes
from benchmarks.campaign.job import Job
from benchmarks.campaign.lines import Lines
from benchmarks.campaign.measure import Context
from benchmarks.campaign.parent import LOST
from benchmarks.campaign.steps import about, attention, layer, layers, prefill, probes, replays, rows, smoke
from benchmarks.micro.workload import LeftOut, Workload


def job(tmp_path: Path, **more: Any) -> Job:
    given = {"seconds": 1000.0, "dry": True, "common": {"campaign": "A"}} | more
    return Job([str(tmp_path / "results.jsonl")], str(tmp_path), str(tmp_path), **given)


def context(tmp_path: Path, step: str = "test", machine: Any = None, **more: Any) -> Context:
    made = job(tmp_path, **more)
    writer = Lines(made.outputs_as_paths(), {**made.common, "step": step})
    return Context(machine or dry.Cpu(), made, writer, sizes.DRY)


def found(tmp_path: Path) -> list[dict[str, Any]]:
    return lines.read(tmp_path / "results.jsonl")


def timed(on: Context, call: Any, check: Any = lambda result: None, **fields: Any) -> None:
    fields = {"op": "an op", "shape": "1", "provider": "us", **fields}
    measure.measure(on, [(call, check)], amount=1e9, unit="GB/s", **fields)


def test_a_right_result_has_its_time_as_a_replay_and_as_a_call(tmp_path):
    Lines([tmp_path / "results.jsonl"], {}).write(kind="ceiling", what="copy", rate=4.0)
    timed(context(tmp_path), lambda: torch.ones(3))
    _, eager, replay = found(tmp_path)
    assert (eager["mode"], replay["mode"]) == ("eager", "replay")
    assert eager["host_us"] > 0
    for line in (eager, replay):
        assert line["n"] >= measure.FEWEST
        assert line["rate"] == pytest.approx(1e9 / (line["median_us"] * 1e-6) / 1e9)
        assert line["share"] == pytest.approx(line["rate"] / 4.0)


def test_a_wrong_result_has_no_number(tmp_path):
    def wrong(result: torch.Tensor) -> None:
        raise AssertionError("not what the reference gives")

    timed(context(tmp_path), lambda: torch.ones(3), wrong)
    [line] = found(tmp_path)
    assert line["status"] == "wrong"
    assert "median_us" not in line


def test_what_a_replay_does_not_write_is_seen(tmp_path):
    """The first call fills everything, later ones leave the last value out."""
    out, calls = torch.zeros(4), []

    def call() -> torch.Tensor:
        calls.append(1)
        out[: 4 if len(calls) <= 3 else 3] = 1.0
        return out

    def check(result: torch.Tensor) -> None:
        assert torch.equal(result, torch.ones(4)), "values are missing"

    on = context(tmp_path)
    measure.measure(on, [(call, check)], amount=1.0, unit="GB/s", op="x", shape="", provider="", modes=("replay",))
    assert [line["status"] for line in found(tmp_path)] == ["wrong"]


def test_integers_are_poisoned_too():
    result = (torch.zeros(2), torch.zeros(2, dtype=torch.int32), None)
    measure.poison(result)
    assert result[0].isnan().all()
    assert (result[1] == 2**31 - 1).all()


def test_what_fails_or_is_left_out_is_a_line_and_the_next_is_measured(tmp_path):
    on = context(tmp_path)

    def out_of_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 40 GiB")

    def absent() -> None:
        raise LeftOut("not installed")

    timed(on, out_of_memory, provider="a")
    timed(on, absent, provider="b")
    timed(on, lambda: torch.ones(1), provider="c")
    assert [line.get("status", "time") for line in found(tmp_path)] == ["failed", "left out", "time", "time"]
    assert "out of memory" in found(tmp_path)[0]["note"]
    assert "test_campaign_steps.py" in found(tmp_path)[0]["note"]


def test_tensors_of_what_failed_are_free_afterwards(tmp_path):
    import gc
    import weakref

    kept = []

    class Peer:
        pass

    def call() -> None:
        peer, cycle = Peer(), []
        cycle += [cycle, peer]
        kept.append(weakref.ref(peer))
        raise RuntimeError("out of memory")

    def both() -> None:
        try:
            call()
        finally:
            call()

    class Machine(dry.Cpu):
        def free(self) -> None:
            """When the cache is emptied, nothing of it may be held any more."""
            assert [peer() for peer in kept] == [None] * len(kept)

    gc.disable()
    try:
        timed(context(tmp_path, machine=Machine()), both)
        assert len(kept) == 2
    finally:
        gc.enable()


def test_what_is_late_or_was_measured_is_not_measured(tmp_path):
    timed(context(tmp_path, seconds=-1.0), lambda: torch.ones(1))
    assert [(line["status"], line["note"]) for line in found(tmp_path)] == [("left out", "late")]
    timed(context(tmp_path), lambda: torch.ones(1))
    count = len(found(tmp_path))
    timed(context(tmp_path), lambda: torch.ones(1))
    assert len(found(tmp_path)) == count, "a process that was started again goes on"
    timed(context(tmp_path, "another step"), lambda: torch.ones(1))
    assert len(found(tmp_path)) > count


def test_every_measurement_gets_its_part_of_the_time(tmp_path):
    on = context(tmp_path, seconds=60.0)
    on.sizes = sizes.FULL
    on.planned = 45
    assert on.share() == pytest.approx(2.0, abs=0.1)
    on.planned = 900
    assert on.share() == pytest.approx(0.1, abs=0.01)


def test_times_are_taken_until_they_are_steady_or_the_time_is_over():
    steady = measure.repeated([lambda: 1.0], 60.0)
    assert len(steady) == measure.LEAST
    noisy = iter(range(1, 10_000))
    assert len(measure.repeated([lambda: float(next(noisy))], 0.0)) == measure.FEWEST
    noisy = iter([1.0, 3.0] * measure.MOST)
    assert len(measure.repeated([lambda: next(noisy)], 60.0)) == measure.MOST
    turns: list[int] = []
    measure.repeated([lambda: turns.append(0) or 1.0, lambda: turns.append(1) or 1.0], 60.0)
    assert turns[:4] == [0, 1, 0, 1]


class Gone(dry.Cpu):
    """A GPU whose context is lost."""

    def wait(self) -> None:
        raise RuntimeError("an illegal memory access was encountered")


def test_a_lost_context_ends_the_process_so_that_it_can_be_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(dry, "Cpu", Gone)
    assert child.main(["every_op", job(tmp_path).text()]) == LOST
    assert "context is lost" in found(tmp_path)[-1]["note"]
    assert child.main(["rows", job(tmp_path).text()]) == LOST, "outside of a measurement, too"


def broken(error: Exception) -> Any:
    """A workload whose check raises."""

    def make(device: torch.device, *size: int) -> Workload:
        def check(result: Any) -> None:
            raise error

        return Workload("gather_rows", "", "GB/s", 1.0, check, {"torch": lambda: lambda: torch.ones(1)})

    make.__name__ = "gather_rows"
    return make


@pytest.mark.parametrize(
    ("step", "error", "code"),
    [("smoke", AssertionError("other rows"), 1), ("smoke", RuntimeError("no launch"), 1),
     ("rows", AssertionError("other rows"), 1), ("rows", RuntimeError("a peer fails"), 0)],
)  # fmt: skip
def test_the_process_says_whether_something_was_wrong(tmp_path, monkeypatch, step, error, code):
    for module in (smoke, rows):
        monkeypatch.setattr(module, "ROWS", [broken(error)])
    assert child.main([step, job(tmp_path).text(), *(["ops"] if step == "smoke" else [])]) == code


def test_a_step_that_breaks_is_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "run", lambda context: 1 / 0)
    assert child.main(["rows", job(tmp_path).text()]) == 1
    assert "ZeroDivisionError" in found(tmp_path)[-1]["note"]


@pytest.mark.parametrize("what", [kernel.name for kernel in kernels.KERNELS])
def test_each_attention_kernel_has_a_smoke_test_of_its_own(tmp_path, what):
    assert child.main(["smoke", job(tmp_path).text(), what]) == 0
    [line] = found(tmp_path)
    assert (line["what"], line["status"]) == (what, "ok")


def test_every_kernel_has_a_child_and_its_own_switch():
    of_kernels = {c.name: (c.off, c.seconds) for c in plan.SMOKE.children if c.name != "ops"}
    assert of_kernels == {kernel.name: (kernel.off, 20) for kernel in kernels.KERNELS}


def test_switches_of_kernels_reach_the_package(monkeypatch):
    pytest.importorskip("triton")
    from orthorank_kernels.triton import configs

    descriptors, pointers, hopper = kernels.KERNELS
    before = configs._has_descriptors()
    with kernels.choosing(pointers):
        assert not configs._has_descriptors()
        assert not configs.fits_tma(torch.zeros(4, 16))
    assert configs._has_descriptors() == before
    assert "ORTHORANK_TMA" not in os.environ
    monkeypatch.setenv("ORTHORANK_TMA", "0")
    with kernels.choosing(descriptors):
        assert configs._has_descriptors() == before
    assert os.environ["ORTHORANK_TMA"] == "0"
    assert kernels.working() == [pointers, hopper]
    assert kernels.timed() == [pointers, hopper], "the only one that is left of the usual ones is timed"
    monkeypatch.setenv(kernels.WITHOUT, "pointers")
    assert kernels.working() == kernels.timed() == [hopper]
    assert kernels.usual() == [], "layers and models have none that they run by themselves"
    with kernels.choosing(hopper):
        assert os.environ["ORTHORANK_ATTENTION"] == "hopper"
        assert configs._has_descriptors() == before, "also where the usual kernel may not use them"
    assert "ORTHORANK_ATTENTION" not in os.environ
    for name, value in hopper.off.items():
        monkeypatch.setenv(name, value)
    assert kernels.working() == []
    assert kernels.working({}) == list(kernels.KERNELS)


@pytest.fixture
def none_works(monkeypatch):
    for kernel in kernels.KERNELS:
        for name, value in kernel.off.items():
            monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("none_works")
def test_without_any_kernel_the_peers_are_measured(tmp_path):
    on = context(tmp_path)
    names = {name for _, name in attention.cases(on)}
    assert not any(name.startswith("orthorank") for name in names)
    assert "SDPA flash, all tokens" in names
    model = layers.made(on, sizes.TINY)
    layer.timed(on, "tiny", layers.layer(on, model, 1, 24), "orthorank_kernels", "")
    assert list(prefill.variants_of(on, model)) == ["dense"]  # two layers are too few for 20 %
    assert [line["status"] for line in found(tmp_path)] == ["left out"] * 3
    assert all("switched off" in line["note"] for line in found(tmp_path))


def test_what_is_cut_is_not_measured(tmp_path, monkeypatch):
    on = context(tmp_path, cuts=["D64", "1x64"])
    assert {(size[:2], size[4]) for size, _ in attention.cases(on)} == {((2, 48), 16)}
    sized = {size for size, name in attention.cases(context(tmp_path)) if name == attention.FLEX}
    assert sized == {(2, 48, 4, 2, 16)}, "FlexAttention at the first heads alone"
    monkeypatch.setattr(sizes, "cut_of", lambda *given: [])
    rows.run(context(tmp_path, cuts=["2x48"]))
    layer.run(context(tmp_path, cuts=["Llama-2-7B", "1x32", "2x48"]))
    prefill.run(context(tmp_path, cuts=["Llama-2-7B", "1x32", "2x48"], seconds=1.0))
    own = [line for line in found(tmp_path) if line.get("kind") != "note"]
    assert {line["status"] for line in own} == {"left out"}
    assert all("late: without" in line["note"] for line in own)


def test_a_late_prefill_says_what_it_leaves_out(tmp_path):
    with torch.inference_mode():
        prefill.whole(context(tmp_path, seconds=0.0), "tiny", sizes.TINY, 0.0, "")
    notes = {(line["variant"], line["note"]) for line in found(tmp_path)}
    assert ("dense", "late") in notes
    assert len(notes) == 5


def test_a_prefill_stops_when_its_next_turn_would_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(prefill, "turn", lambda on, *given: setattr(on, "began", on.began - 90.0))
    prefill.whole(context(tmp_path, seconds=1000.0), "tiny", sizes.TINY, 0.0, "")
    assert not found(tmp_path), "ten turns of 90 s fit, an eleventh does not"


def test_a_plan_that_updates_other_tokens_is_seen():
    from types import SimpleNamespace

    from orthorank import OrthoRankConfig

    config = OrthoRankConfig(layers=[1], keep_ratio=1 / 3)
    prefill.check_counts({1: SimpleNamespace(tokens_updated=33)}, config, 99)
    with pytest.raises(AssertionError, match="layer 1 updated 80"):
        prefill.check_counts({1: SimpleNamespace(tokens_updated=80)}, config, 100)


@torch.inference_mode()
def test_a_selected_layer_is_compared_with_the_dense_one(tmp_path):
    on = context(tmp_path)
    made = layers.layer(on, layers.made(on, sizes.TINY), 2, 30)
    right = made.selected()
    made.check_selected(right)
    made.check_dense(made.dense())
    for wrong, word in (
        (torch.where((right != made.hidden).any(-1, keepdim=True), right * 1.5, right), "distance"),
        (made.dense(), "were to be"),
        (made.hidden, "were to be"),
    ):
        with pytest.raises(AssertionError, match=word):
            made.check_selected(wrong)
    with pytest.raises(AssertionError, match="finite"):
        made.check_dense(right * torch.nan)


def test_layers_that_return_a_tuple_are_read():
    class Old:
        model = type("M", (), {"layers": [None, lambda *given, **more: (torch.ones(1), None)]})

    made = layers.Layer(Old(), torch.ones(1), (torch.ones(1),) * 2, None, None)  # type: ignore[arg-type]
    assert made.dense() == torch.ones(1)


def test_probes_that_differ_or_come_too_late_are_lines(tmp_path):
    class Errs(dry.Cpu):
        def probes(self, every):
            known, run = super().probes(every)

            def one_bit_off(probe):
                got = [x.copy() for x in run(probe)]
                got[0].view("uint8")[0] ^= 64
                return got

            return known[:1], one_bit_off

    probes.run(context(tmp_path, machine=Errs()))
    assert [line["status"] for line in found(tmp_path)] == ["wrong"]
    probes.run(context(tmp_path, seconds=0.0))
    assert "late" in found(tmp_path)[-1]["note"]


@pytest.mark.slow
@torch.inference_mode()
def test_a_replay_that_keeps_old_inputs_is_seen(tmp_path):
    class Stale(dry.Cpu):
        def capture(self, call):
            return call(), lambda: 0.0

    replays.run(context(tmp_path, machine=Stale()))
    wrong = [line for line in found(tmp_path) if line["status"] == "wrong"]
    same = {line["what"] for line in found(tmp_path)} - {line["what"] for line in wrong}
    assert not same, "these checks cannot fail"


def test_what_is_known_of_a_machine(tmp_path, monkeypatch):
    info = tmp_path / "cpuinfo"
    info.write_text("processor : 0\nmodel name\t: A CPU: fast\nflags\t: fpu amx_bf16 sse amx_tile\n")
    assert about.cpu_name(info) == "A CPU: fast"
    assert about.amx_flags(info) == "amx_bf16 amx_tile"
    assert about.cpu_name(tmp_path / "none")
    assert about.amx_flags(tmp_path / "none") == "none"
    assert about.said(["no-such-program"]).startswith("unknown")
    assert about.said(["echo", "570.1, 1980 MHz"]) == "570.1, 1980 MHz"
    assert about.library_hash() == "none" or len(about.library_hash()) == 16
    monkeypatch.setattr(about, "find_spec", lambda name: None)
    assert about.library_hash() == "none"


def test_the_cpu_takes_the_same_calls_as_the_gpu():
    from benchmarks.campaign.cuda import Gpu

    public = {name for name in dir(Gpu) if not name.startswith("_")}
    assert public - {name for name in dir(dry.Cpu) if not name.startswith("_")} == set()


def test_the_calls_of_cuda_are_in_one_short_file():
    folder = Path(kernels.__file__).parent
    with_cuda = [
        path.name
        for path in folder.rglob("*.py")
        if "torch.cuda" in path.read_text() or ".cuda(" in path.read_text() or 'device("cuda' in path.read_text()
    ]
    assert with_cuda == ["cuda.py"]
    assert len((folder / "cuda.py").read_text().splitlines()) <= 80
    for path in folder.rglob("*.py"):
        assert len(path.read_text().splitlines()) < 300, path


def test_tensors_of_a_result_are_found():
    assert [x.numel() for x in dry.tensors((torch.ones(1), [torch.ones(2)], None, 3))] == [1, 2]


def test_dense_layers_take_one_backend_that_runs_here_and_it_is_named(tmp_path):
    from torch.nn.attention import SDPBackend

    from benchmarks.campaign.steps.backends import one_backend

    on = context(tmp_path)
    with one_backend(on) as name:
        assert name == "FLASH_ATTENTION"
        assert torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.math_sdp_enabled()
    [note] = found(tmp_path)
    assert note["what"] == "SDPA CUDNN_ATTENTION is not taken"
    with pytest.raises(RuntimeError, match="CUDNN_ATTENTION runs here"), one_backend(on, [SDPBackend.CUDNN_ATTENTION]):
        pass
