"""``orthorank reproduce``: the paper's tables and figures on a model of one's own."""

from pathlib import Path
from typing import Annotated

import typer

from orthorank.commands import Device, Dtype, Model, names, register
from orthorank.commands.screen import RichScreen, console
from orthorank.common.errors import OrthoRankError

OUTPUT = Path("orthorank-reproduction")
ONLY = "Parts, such as table1,fig4. Default: all."
CALIBRATION = "Text file, or wikitext2 or c4 (with :FOLDER for a local copy), to choose layers on."
TEXT = "Held-out text as NAME=FILE, wikitext2 or c4; may be given several times. Default: wikitext2 and c4."
TASKS = "Zero-shot tasks. Default: the paper's five; none: leave them out."
LONGBENCH = "JSONL file of LongBench questions; hub: from the Hub; none: leave it out."
CRITERION = "Criterion to add to Table 3: a name, or module:function; may be given several times."
QUICK = "Take very little data: minutes on a laptop. The figures only show that the command works."
FULL = "All windows, all rows, all questions, as the paper does. Without it: 32 windows of each text, 200 rows."


def command(
    model: Model = None,
    output: Annotated[Path, typer.Option(help="Folder for cells, pictures, tables.md and summary.json.")] = OUTPUT,
    only: Annotated[str | None, typer.Option(help=ONLY)] = None,
    calibration: Annotated[str, typer.Option(help=CALIBRATION)] = "wikitext2",
    text: Annotated[list[str] | None, typer.Option(help=TEXT)] = None,
    calibration_windows: Annotated[int | None, typer.Option(help="Windows of the searches. Default: all.")] = None,
    calibration_window: Annotated[int, typer.Option(help="Tokens of such a window.")] = 2048,
    window: Annotated[int, typer.Option(help="Tokens of a held-out window.")] = 2048,
    windows: Annotated[int, typer.Option(help="Windows of each held-out text.")] = 32,
    tasks: Annotated[str | None, typer.Option(help=TASKS)] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int, typer.Option(help="First rows of each task.")] = 200,
    longbench: Annotated[str, typer.Option(help=LONGBENCH)] = "hub",
    longbench_tokens: Annotated[int, typer.Option(help="Leave out LongBench prompts of more tokens.")] = 4000,
    criterion: Annotated[list[str] | None, typer.Option(help=CRITERION)] = None,
    rounds: Annotated[int, typer.Option(help="Timed runs of each plan.")] = 10,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose prefill is timed.")] = 2048,
    device: Device = "auto",
    dtype: Dtype = None,
    quick: Annotated[bool, typer.Option("--quick", help=QUICK)] = False,
    full: Annotated[bool, typer.Option("--full", help=FULL)] = False,
) -> int:
    """Measure every table and figure of the paper on a model, and check the paper's claims.

    Every finished cell of the tables is kept in the output folder: the same command goes on where it was stopped.
    """
    from rich.markdown import Markdown

    from orthorank.evaluation.kept import going_on
    from orthorank.reproduce.markdown import markdown
    from orthorank.reproduce.run import reproduce
    from orthorank.reproduce.settings import TASKS as PAPER
    from orthorank.reproduce.settings import ReproduceSettings

    if quick and full:
        raise OrthoRankError("both --quick and --full are given; give one of them")
    chosen = PAPER if tasks is None else () if tasks == "none" else names(tasks)
    settings = ReproduceSettings(
        model=model,
        output=output,
        only=names(only or ""),
        calibration=calibration,
        texts=_texts(text or ["wikitext2", "c4"]),
        calibration_windows=calibration_windows,
        calibration_window=calibration_window,
        windows=None if full else windows,
        window=window,
        tasks=chosen,
        include_path=include_path,
        task_limit=None if full else limit,
        longbench=None if longbench == "none" else longbench,
        longbench_tokens=None if full else longbench_tokens,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        criteria=tuple(register(criterion)),
        device=device,
        dtype=dtype,
    )
    screen = RichScreen(console())
    with going_on(f"finished cells are in {output}"):
        summary = reproduce(settings.quick() if quick else settings, screen)
    screen.console.print(Markdown(markdown(summary)))
    screen.say(f"Everything is in {output}: tables.md, summary.json, the pictures, and the cells.")
    return 0


def _texts(given: list[str]) -> dict[str, str]:
    """Texts by name: ``NAME=FILE``, or a dataset under its own name."""
    texts: dict[str, str] = {}
    for words in given:
        name, equals, source = words.partition("=")
        name = name if equals else name.partition(":")[0]
        if not name or (equals and not source) or name in texts:
            raise OrthoRankError(f"text is {words!r}; it must be NAME=FILE with a name of its own, wikitext2 or c4")
        texts[name] = source if equals else words
    return texts
