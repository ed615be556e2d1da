"""The parent of the GPU campaign: children that hang, crash or come too late, signals, and what is kept of all that."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks import gpu_campaign
from benchmarks.campaign import lines, machine, parent, plan
from benchmarks.campaign.parent import Options, Parent
from benchmarks.campaign.plan import Child, Step
from benchmarks.campaign.processes import descendants

WRITE = """
import sys
from benchmarks.campaign.job import Job
from benchmarks.campaign.lines import Lines
job = Job.read(sys.argv[1])
lines = Lines([job.results, *job.outputs[1:]], job.common)
lines.write(kind="check", what="first", status="ok", told=job.seconds, cuts=job.cuts)
print("said before the end", flush=True)
"""
HANG = "import time\nwhile True: time.sleep(1)\n"


def child(code: str, name: str = "child", **more) -> Child:
    return Child(name, ("-c", WRITE + code, "{job}"), **more)


def step(name: str, *children: Child, seconds: float = 20.0, **saves: float) -> Step:
    return Step(name, seconds, "a test", children, saves)


def run(tmp_path: Path, *steps: Step, seconds: float = 60.0, clock=time.monotonic, **more) -> tuple[int, list, str]:
    output = tmp_path / "out"
    options = Options("A", steps, output, seconds, tmp_path / "machine", **more)
    code = Parent(options, clock).run()
    return code, lines.read(output / "results.jsonl"), (output / "table.md").read_text()


def ends(found: list) -> dict:
    return {line["child"]: line["status"] for line in found if line.get("kind") == "end"}


def test_every_line_says_where_and_with_what_it_was_made(tmp_path):
    code, found, table = run(tmp_path, step("one", child("")))
    assert code == 0
    assert [line.get("what", "end") for line in found] == ["first", "end"]
    for line in found:
        assert {"campaign", "step", "gpu", "torch", "triton", "transformers", "commit", "date"} <= line.keys()
    assert found[0]["torch"] != "none"
    assert "said before the end" in (tmp_path / "out" / "log.txt").read_text()
    assert "1 ok" in table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.jsonl", "log.txt", "table.md"}


def test_a_child_that_hangs_is_killed_with_what_it_started_and_the_next_step_runs(tmp_path):
    forks = (
        f"import subprocess\nfor own in (False, True):\n"
        f"    p = subprocess.Popen([sys.executable, '-c', {HANG!r}], start_new_session=own)\n"
        "    lines.write(what='grandchild', pid=p.pid)\n"
    )
    tells = forks + HANG
    code, found, table = run(tmp_path, step("hangs", child(tells), seconds=4.0), step("next", child("", "after")))
    assert code == 1
    assert ends(found) == {"child": "failed", "after": "ok"}
    [end] = [line for line in found if line.get("child") == "child"]
    assert "killed after 4 s" in end["note"]
    assert "said before the end" in end["note"]
    assert found[0]["what"] == "first", "what it wrote before is kept"
    pids = [line["pid"] for line in found if line.get("what") == "grandchild"]
    assert len(pids) == 2, "one of them in a group of its own"
    assert not any(map(is_alive, pids))
    assert "killed after 4 s" in table


def test_where_there_is_no_proc_nothing_is_found(tmp_path):
    assert descendants(1, tmp_path) == []
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text("7 (a b) c) S 1 7")
    (tmp_path / "8").mkdir()
    (tmp_path / "8" / "stat").write_text("8 (x) R 7 8")
    (tmp_path / "9").mkdir()
    (tmp_path / "9" / "stat").write_text("gone")
    assert descendants(1, tmp_path) == [7, 8]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(
    ("code", "said"),
    [("os = __import__('os')\nos.abort()", "signal 6"), ("raise SystemExit(3)", "exit 3"), ("1 / 0", "ZeroDivision")],
)
def test_a_child_that_crashes_is_a_line(tmp_path, code, said):
    result, found, table = run(tmp_path, step("crashes", child(code)), step("next", child("", "after")))
    assert result == 1
    assert ends(found) == {"child": "failed", "after": "ok"}
    assert said in next(line["note"] for line in found if line.get("child") == "child")
    assert "What failed" in table


def test_a_kernel_that_fails_is_switched_off_for_later_steps(tmp_path):
    look = "import os\nlines.write(what='environment', value=os.environ.get('SWITCH'))"
    smoke = step("smoke", child("raise SystemExit(1)", "bad kernel", off={"SWITCH": "0"}), child("", "good kernel"))
    _, found, table = run(tmp_path, smoke, step("next", child(look, "after")))
    [off] = [line for line in found if line.get("status") == "switched off"]
    assert (off["child"], off["note"]) == ("bad kernel", "SWITCH=0 for all later steps")
    assert [line["value"] for line in found if line.get("what") == "environment"] == ["0"]
    assert "switched off" in table
    assert ends(found) == {"bad kernel": "failed", "good kernel": "ok", "after": "ok"}


def test_children_of_a_step_run_at_the_same_time(tmp_path):
    meet = "from pathlib import Path\nimport time\nPath(job.files, '{}').touch()\nwhile not Path(job.files, '{}').exists(): time.sleep(0.01)"  # noqa: E501
    both = [child(meet.format("a", "b"), "a"), child(meet.format("b", "a"), "b")]
    assert run(tmp_path, step("both", *both))[0] == 0


def test_what_is_late_is_shortened_in_order_and_then_left_out(tmp_path):
    """Each step takes 120 seconds of a clock of our own."""
    steps = [step("one", child(""), seconds=100, D64=10), step("two", child(""), seconds=100, **{"1x32768": 10}),
             step("three", child(""), seconds=100), step("four", child(""), seconds=100)]  # fmt: skip
    now = [0.0]
    campaign = Parent(Options("A", steps, tmp_path / "out", 363.0, tmp_path / "machine"), lambda: now[0])
    ended = campaign.ended

    def takes_long(*given, **more) -> None:
        now[0] += 120
        ended(*given, **more)

    campaign.ended = takes_long
    assert campaign.run() == 0
    found = lines.read(campaign.results)
    kept = ("shortened", "left out")
    said = {line["step"]: (line["status"], line["note"]) for line in found if line["status"] in kept}
    assert said == {
        "one": ("shortened", "late: without D64"),
        "two": ("shortened", "late: without 1x32768"),
        "four": ("left out", "late: 3 s were left"),
    }
    assert [line["told"] for line in found if line.get("what") == "first"] == [86.0, 86.0, 96.0]
    assert "left out" in (tmp_path / "out" / "table.md").read_text()


def test_the_order_of_cuts():
    assert plan.cuts(plan.A, 520) == []
    order = [plan.cuts(plan.A, seconds) for seconds in range(520, 0, -1)]
    assert list(dict.fromkeys(map(tuple, order))) == [
        (), ("D64",), ("D64", "Llama-2-7B"), ("D64", "Llama-2-7B", "1x32768"),
    ]  # fmt: skip
    assert plan.cuts(plan.B, 1) == [], "nothing of B has such a name"
    assert sum(each.seconds for each in plan.A) <= plan.A_SECONDS
    assert sum(each.seconds for each in plan.B) <= plan.B_SECONDS


def test_a_child_is_told_when_to_end_and_what_is_cut(tmp_path):
    _, found, _ = run(tmp_path, step("one", child(""), seconds=40, D64=10), step("two", child("", "b"), seconds=25))
    told = [(line["told"], line["cuts"]) for line in found if line.get("what") == "first"]
    assert told == [(26.0, ["D64"]), (21.0, [])]


def test_a_lost_context_starts_the_child_again_and_not_for_ever(tmp_path):
    _, found, _ = run(tmp_path, step("lost", child(f"raise SystemExit({parent.LOST})")))
    assert sum(line.get("what") == "first" for line in found) == parent.STARTS
    assert sum(line.get("status") == "started again" for line in found) == parent.STARTS - 1


def test_lines_of_another_program_become_results_even_when_it_is_killed(tmp_path):
    writes = (
        "from pathlib import Path\nf = Path(job.work, 'tests.jsonl').open('w')\n"
        'f.write(\'{"test": "a", "status": "passed"}\\n{"test": "b", "status": "failed"}\\n\')\n'
        "f.write('no json\\n{\"t')\nf.flush()\n"
    )  # fmt: skip
    tests = step("parity", child(writes + HANG, lines_from="tests.jsonl"), seconds=3)
    _, found, table = run(tmp_path, tests)
    kept = [(line.get("test"), line["status"]) for line in found if line.get("kind") == "test"]
    assert kept == [("a", "passed"), ("b", "failed"), (None, "ok")]
    assert "1 failed" in table


def test_what_refuses_or_is_not_there_is_left_out(tmp_path):
    refuses = child("print('needs a GPU')\nraise SystemExit(2)", "refuses", refuses=True)
    absent = Child("absent", ("no-such-program", "{python}"), program=True)
    code, found, table = run(tmp_path, step("one", refuses, absent))
    assert code == 0
    assert {line["child"]: line["status"] for line in found if "child" in line} == {
        "refuses": "left out", "absent": "left out",
    }  # fmt: skip
    assert "needs a GPU" in table
    assert "no-such-program" in table


def test_in_a_dry_run_a_program_is_replaced_and_other_children_are_the_same(tmp_path):
    program = Child("tool", ("no-such-program",), program=True, dry=("-c", WRITE, "{job}"))
    code, found, _ = run(tmp_path, step("one", program), dry=True)
    assert code == 0
    assert ends(found) == {"tool": "ok"}
    assert all(line["dry"] for line in found)


def test_files_come_back_as_one_archive_and_large_ones_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(parent, "MOST_BYTES", 6000)
    code = "from pathlib import Path\nPath(job.files, 'a').mkdir()\nPath(job.files, 'a', 'small.txt').write_text('x')\nPath(job.files, 'large.txt').write_text('x' * 9000)\nprint('y' * 20000)"  # noqa: E501
    monkeypatch.setattr(parent, "trim", lambda log: None)
    _, found, _ = run(tmp_path, step("one", child(code)))
    with tarfile.open(tmp_path / "out" / "files-a.tar") as archive:
        assert archive.getnames() == ["a/small.txt"]
    assert "large.txt is too large" in found[-1]["note"]


def test_a_long_log_keeps_beginning_and_end(tmp_path):
    log = tmp_path / "log.txt"
    log.write_bytes(b"begin" + b"x" * (parent.MOST_BYTES + 10) + b"end")
    parent.trim(log)
    text = log.read_bytes()
    assert len(text) < parent.MOST_BYTES
    assert text.startswith(b"begin")
    assert text.endswith(b"end")
    parent.trim(tmp_path / "none")


def test_b_begins_with_the_lines_of_a(tmp_path):
    assert run(tmp_path, step("one", child("")))[0] == 0
    old = tmp_path / "machine" / "1-A.jsonl"
    old.write_text('{"step": "of last week"}\n')
    os.utime(old, (1, 1))
    (tmp_path / "machine" / "2-B.jsonl").write_text('{"step": "of another b"}\n')
    options = Options("B", [step("two", child("", "two"))], tmp_path / "b", 60, tmp_path / "machine", earlier=True)
    Parent(options).run()
    of_a = lines.read(tmp_path / "out" / "results.jsonl")
    found = lines.read(tmp_path / "b" / "results.jsonl")
    assert found[: len(of_a)] == of_a
    assert {line["campaign"] for line in found[len(of_a) :]} == {"B"}
    assert "## one" in (tmp_path / "b" / "table.md").read_text()
    assert "## two" in (tmp_path / "b" / "table.md").read_text()


def test_nothing_is_left_where_nothing_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    assert machine.leave_in(tmp_path / "file" / "folder", "A") == []
    assert machine.earlier(tmp_path / "none", []) == []
    assert machine.commit(tmp_path) == "unknown"
    assert machine.folder().parent.is_dir()


def test_a_package_that_is_absent_has_no_version(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "no-such-package"))
    found = machine.versions()
    assert found.keys() == {"python", "torch", "no-such-package"}
    assert found["no-such-package"] == "none"


def test_a_campaign_that_is_asked_to_stop_keeps_everything(tmp_path):
    code = WRITE + HANG
    script = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(parent.ROOT)!r})
from benchmarks.campaign.parent import Options, Parent
from benchmarks.campaign.plan import Child, Step
steps = [Step("hangs", 60, "", [Child("child", ("-c", {code!r}, "{{job}}"))])]
folder = Path({str(tmp_path)!r})
sys.exit(Parent(Options("A", steps * 2, folder / "out", 60, folder / "machine")).run())
"""
    running = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    results = tmp_path / "out" / "results.jsonl"
    wait_for(lambda: any(line.get("what") == "first" for line in lines.read(results)))
    wait_for((tmp_path / "out" / "log.txt").exists)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=30)
    assert running.returncode == 130
    found = lines.read(results)
    assert [line.get("what", line.get("status")) for line in found] == ["first", "stopped"]
    assert "by SIGTERM" in found[-1]["note"]
    assert "1 ok" in (tmp_path / "out" / "table.md").read_text()
    assert "1 ok" in said, "the table is printed"
    assert "said before the end" in (tmp_path / "out" / "log.txt").read_text()
    assert len(lines.read(next((tmp_path / "machine").iterdir()))) == len(found)


def wait_for(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def test_a_signal_between_steps_stops_before_the_next(tmp_path):
    steps = [step("one", child("")), step("two", child("", "two"))]
    campaign = Parent(Options("A", steps, tmp_path / "out", 60, tmp_path / "machine"))
    write = campaign.write_table

    def told() -> str:
        campaign.heard(signal.SIGINT, None)
        return write()

    campaign.write_table = told
    assert campaign.run() == 130
    assert {line["step"] for line in lines.read(campaign.results)} == {"one", "campaign"}


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    written = lines.Lines([path, tmp_path / "none" / "copy"], {"c": 1}).write(x=float("nan"), y=Path("z"), z=[1.5, {}])
    assert lines.read(path) == [{"a": 1}, written]
    assert (written["x"], written["y"], written["z"]) == (None, "z", [1.5, {}])
    assert lines.read(tmp_path / "none") == []
    path.write_text('[1]\n{"a": 1}\n')
    assert lines.read(path) == [{"a": 1}]


@pytest.mark.parametrize(
    ("given", "said"),
    [(["--steps", "about,nothing"], "'nothing'"), (["--seconds", "0"], "above 0"), ([], "holds results already")],
)
def test_wrong_arguments_are_named(tmp_path, capsys, given, said):
    (tmp_path / "results.jsonl").write_text("" if "--" in str(given) else "{}")
    if given:
        (tmp_path / "results.jsonl").unlink()
    with pytest.raises(SystemExit) as stopped:
        gpu_campaign.main(["A", "--output", str(tmp_path), *given])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_json_of_a_job_is_read_back(tmp_path):
    from benchmarks.campaign.job import Job

    job = Job(["a", "b"], "f", "w", 3.0, ["D64"], True, {"x": 1})
    assert Job.read(job.text()) == job
    assert json.loads(job.text())["cuts"] == ["D64"]


def test_a_patient_campaign_has_longer_limits(tmp_path):
    """As a dry run on a busy machine: a step of 1 second takes 3."""
    slow = step("slow", child("import time\ntime.sleep(2.5)"), seconds=1.0)
    code, found, _ = run(tmp_path, slow, seconds=5.0, patience=20.0)
    assert code == 0
    assert ends(found) == {"child": "ok"}
