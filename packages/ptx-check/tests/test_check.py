"""What a user of the package calls: `check`, and the command."""

import json
from pathlib import Path

import numpy as np
import pytest

from ptx_check import OutOfBounds, PtxError, Uninitialised, UnknownInstruction, check, mutate
from ptx_check.cli import main

KERNELS = Path(__file__).with_name("ptx_files")
SOFTMAX = str(KERNELS / "softmax_sm80.ptx")
RUN = [SOFTMAX, "--grid", "2"]
for given in ("f32:3x200=nan", "f32:3x200", "200", "200", "3", "200"):
    RUN += ["--arg", given]
ADD = """.visible .entry add(.param .u64 x, .param .u32 n) .reqntid 32 {
    .reg .pred %p<3>; .reg .b32 %r<9>; .reg .b64 %rd<5>;
    ld.param.b64 %rd1, [x]; ld.param.b32 %r1, [n]; mov.u32 %r2, %tid.x; setp.lt.u32 %p1, %r2, %r1;
    mul.wide.u32 %rd2, %r2, 4; add.s64 %rd3, %rd1, %rd2;
    @%p1 ld.global.b32 %r3, [%rd3]; add.s32 %r4, %r3, 1; @%p1 st.global.b32 [%rd3], %r4; ret; }"""


def test_every_schedule_begins_with_the_same_arguments():
    x = np.zeros(20, np.int32)
    steps = check(ADD, (1,), [x, 20], seeds=(None, 1, 2))
    assert x.tolist() == [1] * 20
    assert steps > check(ADD, (1,), [x, 20], seeds=(None,))


def test_a_bound_that_is_too_large():
    with pytest.raises(OutOfBounds, match="byte 80 of the storage of argument 0, which has 80 bytes"):
        check(ADD, (1,), [np.zeros(20, np.int32), 21])


def test_what_is_stored_must_have_been_written():
    with pytest.raises(Uninitialised, match="thread 20"):
        check(ADD.replace("@%p1 st", "st"), (1,), [np.zeros(32, np.int32), 20])


def test_what_cannot_be_passed():
    with pytest.raises(ValueError, match=r"argument 0 has strides \(8,\): pass a contiguous array"):
        check(ADD, (1,), [np.zeros(40, np.int32)[::2], 20])
    with pytest.raises(ValueError, match="parameter 1 has 4 bytes: a pointer has 8"):
        check(ADD, (1,), [np.zeros(20, np.int32), np.zeros(1, np.int32)])
    with pytest.raises(UnknownInstruction, match="frob"):
        check(ADD.replace("add.s32 %r4", "frob.s32 %r4"), (1,), [np.zeros(20, np.int32), 20])


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"arguments": [np.zeros(20, np.int32)]}, "1 arguments were given, and parameter 1 has 4 bytes: only pointers"),
        ({"arguments": [np.zeros(20, np.int32), 20.0]}, "argument 1 is 20.0; parameter 1 is a whole number: pass an"),
        ({"arguments": [[0] * 20, 20]}, "argument 0 is a list; it must be a NumPy array, a number or a Descriptor"),
        ({"arguments": [np.broadcast_to(np.int32(0), 20), 20]}, "argument 0 is read-only, and kernels may write to it"),
        ({"grid": 1}, "grid is 1; it must be one to three numbers of at least 1, such as"),
        ({"grid": (0,)}, "grid is "),
        ({"grid": (1, 1, 1, 1)}, "grid is "),
        ({"kernel": ADD.encode()}, "kernel is bytes; it must be the text of a PTX file, or a Program"),
        ({"kernel": "add.ptx"}, "no entry function in this PTX, which is the text of a file, not its name"),
        ({"kernel": ADD.replace("32 {", "20 {")}, "has .reqntid 20; only whole warps are run, along x alone"),
        ({"kernel": ADD.replace("32 {", "32, 2 {")}, "has .reqntid 32, 2; only whole warps are run, along x alone"),
    ],
)
def test_what_is_not_run(wrong, sentence):
    """Nothing that was left out or misunderstood ends as "nothing found"."""
    with pytest.raises((ValueError, PtxError), match=sentence):
        check(**{"kernel": ADD, "grid": (1,), "arguments": [np.zeros(20, np.int32), 20], **wrong})


def test_a_whole_number_for_a_parameter_with_a_point():
    ptx = """.visible .entry fill(.param .u64 x, .param .f32 v) .reqntid 32 { .reg .b32 %r<3>; .reg .b64 %rd<3>;
        ld.param.b64 %rd1, [x]; ld.param.b32 %r1, [v]; st.global.b32 [%rd1], %r1; ret; }"""  # of each thread the same
    x = np.zeros(1, np.float32)
    check(ptx, (1,), [x, 2])
    assert x[0] == 2


def test_shared_memory_of_unknown_size():
    ptx = Path(SOFTMAX).read_text(encoding="utf-8")
    arguments = [np.zeros((3, 200), np.float32), np.zeros((3, 200), np.float32), 200, 200, 3, 200]
    with pytest.raises(
        OutOfBounds, match=r"of shared memory, which has 0: pass shared_bytes \(--shared\), which Triton"
    ):
        check(ptx, (2,), arguments)


@pytest.mark.parametrize("option", [("--arg", "1"), ("--mutate",), ("--trace",)])
def test_the_command_runs_nothing_without_a_grid(option, capsys):
    with pytest.raises(SystemExit):
        main([SOFTMAX, *option])
    assert f"{option[0]} runs the kernel: give --grid" in capsys.readouterr().err


def test_the_command_says_that_nothing_was_changed(capsys, tmp_path):
    (tmp_path / "add.ptx").write_text(ADD)
    assert main([str(tmp_path / "add.ptx"), "--grid", "1", "--arg", "i32:20", "--arg", "0"]) == 0
    assert "no array was changed: are --grid and every --arg as in a real launch?" in capsys.readouterr().out


def test_the_command_says_what_is_in_a_file(capsys, tmp_path):
    assert main([SOFTMAX]) == 0
    said = capsys.readouterr().out
    assert said.startswith("softmax_kernel: 128 threads, 132 instructions\n")
    assert "parameter 2: 4 bytes" in said
    file = tmp_path / "add.ptx"
    file.write_text(ADD.replace("add.s32 %r4", "frob.s32 %r4"))
    assert main([str(file)]) == 2
    assert main([str(file), "--grid", "1", "--arg", "i32:20", "--arg", "20"]) == 2
    assert "cannot be run: frob.s32 %r4, %r3, 1" in capsys.readouterr().out


def test_the_command_runs_a_kernel_and_breaks_it(capsys):
    assert main(RUN) == 0  # the bytes of shared memory are those of softmax_sm80.json
    said = capsys.readouterr().out
    assert said.startswith("nothing found under 4 schedules")
    assert "argument 0: 600 of 600 elements changed" in said
    assert main([*RUN, "--schedules", "1", "--mutate"]) == 1
    said = capsys.readouterr().out
    assert "8 broken kernels: 6 noticed by a check, 0 by the result, 0 redundant, 2 not noticed" in said
    assert "not noticed: barrier at 130, bar.sync 0 tutorials.py:24" in said


def test_what_was_run_is_not_run_again():
    ptx = Path(SOFTMAX).read_text(encoding="utf-8")
    runs = []

    def run(program):
        runs.append(program)
        x = np.ones((3, 200), np.float32)
        check(program, (2,), [np.full_like(x, np.nan), x, 200, 200, 3, 200], shared_bytes=1040, seeds=(1,))

    whole, known, told = list(mutate(ptx, run)), {}, []
    all_runs = len(runs)
    assert all_runs == 1 + 8 + 1  # as it is, without each, and without both that nobody misses
    early = mutate(ptx, run, known)
    assert [next(early), next(early)] == whole[:2]  # the others are yet to come
    assert len(runs) == all_runs + 3
    early.close()
    assert list(mutate(ptx, run, known, lambda *numbers: told.append(numbers))) == whole
    assert len(runs) == 2 * all_runs + 1  # as it is, once more
    assert told == [(n, 8) for n in range(8)] + [(8, 10), (9, 10)]


def test_the_command_reports_a_fault(capsys, tmp_path):
    text = Path(SOFTMAX).read_text(encoding="utf-8").replace("\tbar.sync \t0;\n", "")
    (tmp_path / "planted.ptx").write_text(text, encoding="utf-8")
    (tmp_path / "planted.json").write_text(json.dumps({"shared": 1040}))
    assert main([str(tmp_path / "planted.ptx"), *RUN[1:]]) == 1
    assert capsys.readouterr().err.startswith("Race: ")


def test_the_command_traces(capsys):
    assert main([*RUN, "--trace"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 100
    assert "`ld.param.b32 %r" in lines[0]


@pytest.mark.parametrize("wrong", ["f32", "q8:3", "f32:3xa", "i32:4=nan", "1e", "nowhere.npy"])
def test_arguments_that_are_none(wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        main([*RUN[:3], "--arg", wrong])
    assert raised.value.code == 2, "not understood"
    assert "is no number, no FILE.npy and no array such as f32:7x200" in capsys.readouterr().err


def test_what_is_no_ptx(capsys, tmp_path):
    """The command was not understood, and nothing found."""
    (tmp_path / "noise.ptx").write_bytes(bytes(range(128, 256)))
    with pytest.raises(SystemExit) as raised:
        main([str(tmp_path / "noise.ptx")])
    assert raised.value.code == 2
    assert "noise.ptx is no PTX, which is text" in capsys.readouterr().err
    (tmp_path / "words.ptx").write_text("The river is wide.")
    (tmp_path / "add.ptx").write_text(ADD)
    assert main([str(tmp_path / "words.ptx")]) == 2
    assert main([str(tmp_path / "add.ptx"), "--grid", "1", *["--arg", "1"] * 9]) == 2
    (tmp_path / "add.json").write_text("[]")
    assert main([str(tmp_path / "add.ptx"), "--grid", "1", "--arg", "i32:20", "--arg", "20"]) == 2


def test_an_array_larger_than_the_memory(capsys):
    with pytest.raises(SystemExit) as raised:
        main([*RUN[:3], "--arg", "f32:99999999999999"])
    assert raised.value.code == 2
    assert "--arg f32:99999999999999 is larger than the memory here" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [("--grid", "a"), ("--grid", "0"), ("--grid", "2,-1"), ("--schedules", "0")])
def test_numbers_that_mean_nothing(wrong, capsys):
    with pytest.raises(SystemExit) as raised:
        main([*RUN, *wrong])
    assert raised.value.code == 2
    assert "is no whole number of at least 1" in capsys.readouterr().err


def test_arrays_from_files_and_all_kinds_of_numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(20, dtype=np.int32))
    (tmp_path / "add.ptx").write_text(ADD)
    for given in (f"{tmp_path}/x.npy", "i32:20=-3", "f32:20", "bf16:64", "f16:5x8=nan"):
        assert main([str(tmp_path / "add.ptx"), "--grid", "1", "--arg", given, "--arg", "0x14"]) == 0
    assert main([str(tmp_path / "add.ptx"), "--grid", "1", "--arg", "bf16:39", "--arg", "20"]) == 1
