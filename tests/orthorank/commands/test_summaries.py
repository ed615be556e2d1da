"""Every command is said in a line that fits, and its help ends in examples that it would take."""

import shlex
from pathlib import Path

import pytest
import typer

from orthorank.cli import COMMANDS, EVALUATIONS, _app, main
from orthorank.commands.summaries import EXAMPLES, SHORT
from orthorank.config import OrthoRankConfig

EVERY = [*COMMANDS, "eval", *(f"eval {name}" for name in EVALUATIONS)]
LINES = [line for lines in EXAMPLES.values() for line in lines]


@pytest.fixture
def orthorank(capsys: pytest.CaptureFixture[str]):
    """``orthorank(*arguments)`` in this process: exit code and stdout."""

    def call(*arguments: str) -> tuple[int, str]:
        return main(list(arguments)), capsys.readouterr().out

    return call


def test_each_command_is_there() -> None:
    assert list(SHORT) == EVERY
    assert [name for name in EVERY if name != "eval"] == list(EXAMPLES)


def test_the_list_fits_80_columns(orthorank) -> None:
    code, out = orthorank("--help")
    assert code == 0
    assert "..." not in out.partition("Commands:")[2]
    assert all(len(line) <= 80 for line in out.splitlines())
    assert all(len(f"  {line}") <= 92 for line in LINES)


@pytest.mark.parametrize("line", LINES)
def test_an_example_is_a_call_that_the_command_takes(line: str) -> None:
    group = typer.main.get_command(_app())
    words = shlex.split(line)[1:]
    name = words.pop(0)
    command = group.commands[name]
    if name == "eval":
        command = command.commands[words.pop(0)]
    if name == "lm-eval":  # hands its words on
        assert "--model_args" in words
        return
    context = command.make_context(name, list(words))
    assert context.params


@pytest.mark.parametrize("line", [line for line in LINES if "./my-model" in line])
def test_an_example_runs_as_far_as_its_model(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing that the command needs is missing: with its files there, it stops at the model, which is not."""
    monkeypatch.chdir(tmp_path)
    for name in {"my-plan", "better", "pruned"} - {line.partition(" --output ")[2]}:
        OrthoRankConfig(layers=[1], keep_ratio=0 if name == "pruned" else 0.5).save_pretrained(name)
    Path("my.txt").write_text("The river is wide. " * 999)
    Path("prompts.jsonl").write_text('{"prompt": "The river"}\n{"prompt": "The bridge"}\n')
    Path("longbench.jsonl").write_text('{"task": "trec", "prompt": "a", "gold": ["b"]}\n')
    for name in ("evaluation_text", "dataset_texts"):  # no Hub
        monkeypatch.setattr(f"orthorank.common.datasets.{name}", lambda *_, **__: (None, None))
    assert main(shlex.split(line)[1:]) == 2
    assert "'./my-model'" in capsys.readouterr().err


def test_the_help_of_a_command_ends_in_its_examples(orthorank) -> None:
    _, out = orthorank("search", "--help")
    assert out.rstrip().endswith(EXAMPLES["search"][-1])


def test_shares_and_dtypes_as_people_write_them(orthorank) -> None:
    plain = orthorank("estimate", "llama-3-8b", "--sparsity", "0.2", "--dtype", "bfloat16", "--json")
    assert orthorank("estimate", "llama-3-8b", "--sparsity", "20%", "--dtype", "bf16", "--json") == plain
    assert plain[0] == 0
