"""Command lines made at random, of every command and every option there is: answered, or refused in a sentence.

Each names a model: one that is not there, one that is none, or a tiny one, on which a command is a matter of a second.
A line has `SECONDS`, after which it counts as one that hangs.
"""

import json
import logging
import random
import shutil
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import orthorank
from orthorank import cli
from tests.orthorank.test_fuzz_plans import left_over, plan_text

SECONDS = 120
NUMBERS = ["0", "-1", "1", "2", "5", "0.5", "1/3", "nan", "inf", "1e400", "9" * 400, "99999999999"]
WORDS = ["", "x", "é", "[/red]", "a,b", "1,2", "0.2,0.5", "-", "--", "\t", "'", "none", "x" * 5000]
CHOICES = {  # of options that are one of a few words
    "--device": ["auto", "cpu", "cuda:99", "meta"],
    "--dtype": ["float32", "bfloat16", "int3"],
    "--bos": ["auto", "first", "every", "none"],
    "--method": ["greedy", "one-shot", "budget", "given", "random"],
    "--metric": ["loss", "kl", "cosine"],
    "--criterion": ["orthogonal", "inverse", "random", "cosine"],
    "--decode": ["all", "threshold"],
    "--engine": ["transformers", "vllm"],
    "--tasks": ["rivers", "lcc", "none", "no-such"],
    "--only": ["fig5", "sweep", "fig9", "table1,"],
    "--dataset": ["wikitext2", "c4", "no-such"],
    "--calibration": ["wikitext2", "c4:no-such"],
}

TASK = """task: rivers
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_target: a
doc_to_choice: choices
"""


class Given(NamedTuple):
    """What lines name: folders and files that are right, and such that are not."""

    model: Path
    plan: Path
    pruned: Path
    text: Path
    tasks: Path
    questions: Path
    prompts: Path


def usual(command: str, given: Given) -> list[str]:
    """Options with which ``command`` takes a second on a tiny model."""
    text, plan = ["--text", str(given.text)], ["--plan", str(given.plan)]
    windows = ["--windows", "1", "--window", "24"]
    small = {
        "demo": [
            *(*text, *plan, "--windows", "2", "--window", "24", "--rank", "2"),
            *("--prompt-tokens", "24", "--rounds", "1"),
        ],
        "estimate": ["--prompt", "24", "--sparsity", "0.3"],
        "bench": [*plan, "--prompt-tokens", "16", "--rounds", "1"],
        "analyze": [*text, *windows, "--passages", "2", "--passage-tokens", "12"],
        "search": [*text, *windows, "--no-sink-floor", "--layers", "1"],
        "calibrate": [*text, *plan, *windows],
        "correct": [*text, "--windows", "2", "--window", "24", "--rank", "2"],
        "compare": [*plan, "--prompts", str(given.prompts), "--max-new-tokens", "2"],
        "export": ["--plan", str(given.pruned), "--output", "exported"],
        "eval ppl": [*text, *plan, "--window", "24", "--windows", "1"],
        "eval tasks": ["--tasks", "rivers", "--include-path", str(given.tasks), "--limit", "1"],
        "eval longbench": ["--data", str(given.questions), "--limit", "1", "--max-tokens", "96"],
        "reproduce": [
            *("--calibration", str(given.text), "--text", f"one={given.text}", "--tasks", "none"),
            *("--longbench", "none", "--calibration-windows", "1", "--calibration-window", "24", "--window", "24"),
            *("--windows", "1", "--rounds", "1", "--prompt-tokens", "16", "--only", "fig5"),
        ],
        "lm-eval": [
            *("--model", "orthorank", "--model_args", f"pretrained={given.model}", "--device", "cpu"),
            *("--tasks", "rivers"),
            *("--include_path", str(given.tasks), "--limit", "1"),
        ],
    }
    return small.get(command, [])


def commands() -> dict[str, Any]:
    """Every command by its words, with what typer knows of it."""
    import typer

    def below(group: Any, words: list[str]) -> Iterator[tuple[str, Any]]:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from below(command, [*words, name])
            else:
                yield " ".join([*words, name]), command

    return dict(below(typer.main.get_command(cli._app()), []))


def value_of(option: str, rng: random.Random, paths: list[str]) -> str:
    ours = CHOICES.get(option, [])
    return rng.choice(rng.choice([pool for pool in (ours, ours, NUMBERS, WORDS, paths) if pool]))


def on_cpu(name: str) -> list[str]:
    return [] if name == "export" else ["--device", "cpu"]  # where it always is


def right_line(name: str, given: Given) -> list[str]:
    """The command ``name`` with what it needs, all of it right."""
    model = [str(given.model), *on_cpu(name)]
    needed = {
        "env": [],
        "lm-eval": [],
        "vllm-args": [str(given.plan), "--model", str(given.model)],
        "demo": ["--model", *model],
        "correct": [str(given.plan), *model],
    }
    return [*name.split(), *needed.get(name, model), *usual(name, given)]


def line_of(rng: random.Random, given: Given, wrong: list[str], kinds: dict[str, Any]) -> list[str]:
    """A command, a model, what makes it short, and up to four options of its own with any values."""
    name = rng.choice([*kinds, "", "no-such", "eval"])
    command = kinds.get(name)
    paths = [*map(str, given), *wrong]
    words = name.split()
    if name in ("env", "", "no-such", "eval", "lm-eval"):
        words += usual(name, given)
    elif name == "vllm-args":
        words += [rng.choice([str(given.plan), *paths]), *rng.choice([["--model", str(given.model)], []])]
    elif name == "estimate":
        words += [rng.choice([str(given.model), str(given.model), *wrong]), *usual(name, given)]
    else:
        model = rng.choice([str(given.model), str(given.model), *wrong])
        first = {"demo": ["--model"], "correct": [rng.choice([str(given.plan), *paths])]}.get(name, [])
        words += [*first, model, *on_cpu(name), *usual(name, given)]
    own = [p for p in command.params if p.param_type_name == "option"] if command is not None else []
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        option = rng.choice(own) if own and rng.random() < (0.95 if len(own) > 2 else 0.5) else None
        if option is None:
            words.append(rng.choice([*WORDS, "--help", "--no-such", "--json"]))
        elif option.is_flag:
            words.append(rng.choice([*option.opts, *option.secondary_opts]))
        else:
            words += [option.opts[0], value_of(option.opts[0], rng, paths)]
    return words


@contextmanager
def limited(seconds: int) -> Iterator[None]:
    """What takes longer is stopped, by what no handler of errors catches."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt(f"after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def as_in_a_new_process() -> Iterator[None]:
    """What a line makes of logging ends with it: the harness's handlers hold streams that pytest closes."""
    loggers = [logging.getLogger(name) for name in (None, "lm_eval")]
    before = [list(logger.handlers) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers


def is_ours(error: BaseException) -> bool:
    """Whether the statement that raised ``error`` is this package's: the harness has errors of its own."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return frame is not None and frame.tb_frame.f_code.co_filename.startswith(str(Path(orthorank.__file__).parent))


def end_of(words: list[str], capsys: pytest.CaptureFixture[str]) -> int | str:
    """The exit code of a line, or the name of an error of lm-evaluation-harness."""
    with warnings.catch_warnings(), limited(SECONDS), as_in_a_new_process():
        warnings.simplefilter("ignore")
        try:
            code: int | str = cli.main(words)
        except Exception as error:
            if words[:1] != ["lm-eval"] or is_ours(error):
                raise
            code = type(error).__name__
    said = capsys.readouterr()
    assert "Traceback" not in said.err + said.out
    assert "interrupted" not in said.err, f"it was still running after {SECONDS} s"
    assert code in (0, 1, 2) or words[:1] == ["lm-eval"], code
    assert code != 2 or said.err.strip(), "it failed without a word"
    return code


def whole(folder: Path) -> None:
    """No part of a file is left, and what is JSON can be read."""
    assert not left_over(folder)
    for file in folder.rglob("*.json"):
        json.loads(file.read_text(encoding="utf-8"))
    for file in folder.rglob("*.jsonl"):
        for line in file.read_text(encoding="utf-8").splitlines():
            json.loads(line)


class Lines(NamedTuple):
    given: Given
    kinds: dict[str, Any]
    ends: Counter[tuple[str, Any]]


@pytest.fixture(scope="module")
def lines(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Lines:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(tiny_folder, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.eos_token = "!"
    tokenizer.save_pretrained(folder / "model")
    plan = orthorank.OrthoRankConfig(layers=[3, 4], keep_ratio=0.3).save_pretrained(folder / "plan")
    (folder / "text.txt").write_text(" ".join(f"word {n} of a text" for n in range(60)), encoding="utf-8")
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "rows.jsonl").write_text(json.dumps({"q": "the river", "choices": ["is wide", "runs"], "a": 0}))
    (tasks / "rivers.yaml").write_text(TASK.format(rows=tasks / "rows.jsonl"), encoding="utf-8")
    (folder / "questions.jsonl").write_text(json.dumps({"task": "lcc", "idx": 0, "prompt": "x = 1", "gold": ["y"]}))
    (folder / "prompts.txt").write_text("the river\nthe old bridge\n")
    pruned = orthorank.OrthoRankConfig(layers=[3, 4], keep_ratio=0).save_pretrained(folder / "pruned")
    given = Given(
        folder / "model",
        Path(plan),
        Path(pruned),
        folder / "text.txt",
        tasks,
        folder / "questions.jsonl",
        folder / "prompts.txt",
    )
    return Lines(given, commands(), Counter())


def try_line(seed: int, lines: Lines, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = random.Random(seed)
    none = folder / "none"
    none.mkdir()
    (none / "config.json").write_text(rng.choice(["", "{}", '{"model_type": "no such"}', "[]"]), encoding="utf-8")
    (none / "orthorank.json").write_text(plan_text(rng), encoding="utf-8")
    wrong = [str(none), str(none / "orthorank.json"), str(none / "no-such"), "no-such/model"]
    words = line_of(rng, lines.given, wrong, lines.kinds)
    inputs = {
        file: file.read_bytes() for of in (none, lines.given.model.parent) for file in of.rglob("*") if file.is_file()
    }
    try:
        code = end_of(words, capsys)
        whole(folder / "here")
        for file, before in inputs.items():
            assert file.read_bytes() == before, f"{file} was changed"
    except BaseException as error:
        error.add_note(f"line {seed}: {' '.join(word[:200] for word in words)}")
        raise
    name = " ".join(words[:2] if words[:1] == ["eval"] else words[:1])
    lines.ends[name if name in lines.kinds else "", code] += 1


def try_lines(seeds: range, lines: Lines, folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # names that are no model are not looked up
    for seed in seeds:
        own = folder / str(seed)
        (own / "here").mkdir(parents=True)
        monkeypatch.chdir(own / "here")
        try_line(seed, lines, own, capsys)
        monkeypatch.chdir(folder)
        shutil.rmtree(own)


def test_thirty_lines_at_random(
    lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    try_lines(range(30), lines, tmp_path, capsys, monkeypatch)
    assert {0, 2} <= {code for _, code in lines.ends}


@pytest.mark.slow
def test_five_hundred_lines_at_random(
    lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every command there are some that are answered, and some that are refused."""
    lines.ends.clear()
    try_lines(range(100, 600), lines, tmp_path, capsys, monkeypatch)
    for name in lines.kinds:
        codes = {code for of, code in lines.ends if of == name}
        assert codes - {0}, name
        monkeypatch.chdir(tmp_path)
        answer = 1 if name == "doctor" else 0  # which finds no sink in a tiny random model
        assert end_of(right_line(name, lines.given), capsys) == answer, name


def test_every_command_is_among_them() -> None:
    assert len(commands()) == 17
    assert {"eval tasks", "eval longbench", "reproduce", "env", "lm-eval", "search"} <= set(commands())
