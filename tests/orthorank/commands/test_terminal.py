"""What users name is printed as it is: [brackets] and :colons: are not the terminal's markup."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.text import Text

from orthorank.cli import main
from orthorank.commands.screen import RichScreen, console
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig

NAMES = ("[/red]", "[bold]model", "a [/] b", ":smile:", "[link=x]y", "100 % {braces} [")


def terminal(monkeypatch: pytest.MonkeyPatch) -> tuple[RichScreen, io.StringIO]:
    """A screen as the commands make it, on a terminal that is kept."""
    monkeypatch.setenv("TERM", "xterm")
    made, out = console(), io.StringIO()
    made.file, made._force_terminal, made.is_interactive, made.width = out, True, True, 200
    return RichScreen(made), out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("total", [1, 3])
def test_titles_and_notes_of_progress(monkeypatch: pytest.MonkeyPatch, name: str, total: int) -> None:
    screen, out = terminal(monkeypatch)
    with screen.progress(f"loading {name}", total) as advance:
        advance(1, f"note {name}")
    drawn = Text.from_ansi(out.getvalue()).plain
    assert f"loading {name}" in drawn
    assert (f"note {name}" in drawn) == (total > 1)


def test_a_log_says_what_is_begun(capsys: pytest.CaptureFixture[str]) -> None:
    """On a file or pipe, where no bar is drawn: else a command says nothing until its first result."""
    screen = RichScreen(console())
    for total in (1, 3):
        with screen.progress(f"loading {total}", total) as advance:
            assert f"loading {total} ..." in capsys.readouterr().out
            advance(1, "note")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", NAMES)
def test_headings_sentences_and_tables(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from orthorank.commands.search import show

    screen, out = terminal(monkeypatch)
    screen.heading(name)
    screen.say(name)
    row: dict[str, Any] = {"name": name, "layers": [1], "loss": 1.0, "perplexity": 2.0, "flop_speedup": 1.0}
    show(screen, {"rows": [row], "plan_file": name}, "orthorank demo")
    screen.console.print(name)
    assert Text.from_ansi(out.getvalue()).plain.count(name) == 5


def test_a_search_says_how_its_plan_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = {"rows": [], "plan_file": "out/orthorank.json"}
    monkeypatch.setattr("orthorank.search.run.run_search", lambda settings, screen: found)
    assert main(["search", "./my model", "--output", "out"]) == 0
    assert "use it with orthorank demo './my model' --plan out" in " ".join(capsys.readouterr().out.split())


def test_every_command_takes_its_terminal_from_one_place() -> None:
    folder = Path(__file__).parents[3] / "orthorank"
    makers = [file.name for file in folder.rglob("*.py") if "Console(" in file.read_text(encoding="utf-8")]
    assert makers == ["screen.py"]


@pytest.mark.parametrize("command", [["doctor"], ["search"], ["calibrate"], ["eval", "ppl"], ["analyze"]])
def test_a_model_that_is_called_like_markup(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The title of the spinner was read as markup before anything could fail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "[").mkdir()
    (tmp_path / "[" / "red]").mkdir()
    assert main([*command, "./[/red]"]) == 2
    assert "model './[/red]' is a folder without config.json" in capsys.readouterr().err


def test_a_table_in_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import platform

    monkeypatch.setattr(platform, "machine", lambda: "x[/red]")
    assert main(["env"]) == 0
    assert "x[/red]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "names"),
    [
        (["bench"], ["bench.json", "bench.csv"]),
        (["eval", "ppl"], ["ppl.json"]),
        (["eval", "tasks"], ["tasks.json"]),
        (["eval", "longbench", "--data", "data.jsonl"], ["longbench.json"]),
        (["compare", "--plan", "plan", "--prompts", "prompts.txt"], ["compare.json", "compare.html"]),
        (["analyze"], ["analysis.json"]),
        (["demo"], ["results.json", "report.html", "orthorank.json", "orthorank-pruning.json"]),
    ],
)
def test_results_that_are_replaced_are_said(
    command: list[str],
    names: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before the model is loaded, when there is time to stop."""

    def stop(*_: Any, **__: Any) -> None:
        raise OrthoRankError("as far as this")

    monkeypatch.chdir(tmp_path)
    for module in ("orthorank.demo.job", "orthorank.models"):  # a module that is imported now keeps what it finds
        monkeypatch.setattr(f"{module}.load_model", stop)
    OrthoRankConfig(layers=[1]).save_pretrained("plan")
    Path("prompts.txt").write_text("a\nb\n")
    Path("data.jsonl").write_text('{"task": "trec", "prompt": "a", "gold": ["b"]}\n')
    Path("out").mkdir()
    for name in names:
        assert main([*command, "--output", "out"]) == 2
        said = capsys.readouterr()
        assert "Replaces" not in said.out
        assert "as far as this" in said.err
        Path("out", "results.json" if command == ["demo"] else name).write_text("{}")
        Path("out", name).write_text("{}")
        assert main([*command, "--output", "out"]) == 2
        assert f"out/{name}" in " ".join(capsys.readouterr().out.split()).partition("Replaces ")[2]
        for file in Path("out").iterdir():
            file.unlink()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (["eval", "ppl"], "ppl-rows.jsonl"),
        (["eval", "tasks"], "tasks-rows.jsonl"),
        (["eval", "longbench", "--data", "data.jsonl"], "answers.jsonl"),
        (["compare", "--plan", "plan", "--prompts", "prompts.txt"], "compare-state.jsonl"),
    ],
)
def test_broken_rows_are_said_before_the_model_is_loaded(
    command: list[str],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("orthorank.models.load_model", None)
    OrthoRankConfig(layers=[1]).save_pretrained("plan")
    Path("prompts.txt").write_text("a\nb\n")
    Path("data.jsonl").write_text('{"task": "trec", "prompt": "a", "gold": ["b"]}\n')
    Path("out").mkdir()
    Path("out", name).write_text('{"key": "a", "row": {}, "answer": ""}\nnonsense\n')
    assert main([*command, "--output", "out"]) == 2
    assert f"out/{name} is no file of " in (said := capsys.readouterr().err)
    assert "(line 2); delete it, or name another output folder" in said
