"""``orthorank demo``: the main job on a real model, with a table at the end and a report beside it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands.screen import BOS, MODEL, RichScreen, console, number, numbers, table_of
from orthorank.common import format as words

if TYPE_CHECKING:
    from rich.table import Table


OUTPUT = Path("orthorank-demo")
TEXT = "UTF-8 text file. Default: the documentation of Python inside its standard library."
PLAN = "search, default (the plan shipped for the model), or the path of a plan."
SPARSITY = (
    "Share of token updates that a search leaves out, over all layers; layer pruning gets the same. Default: 0.2."
)
KEEP_RATIO = "Share of the tokens that a chosen layer still updates, in a search or with --layers. Default: 1/3."
LAYERS = "Select in these layers instead of searching, such as 12,14 or 12-16,20."
SINK_LAYER = "Search after this layer, instead of the one in which the sink was found to form."


def command(
    model: Annotated[str | None, typer.Option(help=MODEL)] = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    plan: Annotated[str, typer.Option(help=PLAN)] = "search",
    output: Annotated[Path, typer.Option(help="Folder for report.html, results.json and the plans.")] = OUTPUT,
    sparsity: Annotated[str | None, typer.Option(help=SPARSITY)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    windows: Annotated[int, typer.Option(help="Calibration windows of a search.")] = 2,
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 256,
    bos: Annotated[str, typer.Option(help=BOS)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    layers: Annotated[str | None, typer.Option(help=LAYERS)] = None,
    sink_layer: Annotated[int | None, typer.Option(help=SINK_LAYER)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose prefill is timed.")] = 2048,
    repeats: Annotated[int, typer.Option(help="Timed runs of each variant.")] = 3,
) -> int:
    """Find a plan, measure it against layer pruning, and write a report.

    Looks at the model's sink token, chooses layers by greedy search (or takes a plan), and measures perplexity and
    prefill speed of the dense model, of layer pruning (SLEB) and of OrthoRank at the same sparsity.
    """

    from orthorank.demo.settings import Settings

    settings = Settings(
        output=output,
        model=model,
        text=text,
        plan=plan,
        sparsity=number("sparsity", sparsity),
        keep_ratio=number("keep_ratio", keep_ratio),
        windows=windows,
        seq_len=seq_len,
        bos=bos,
        device=device,
        layers=numbers("layers", layers),
        sink_layer=sink_layer,
        prompt_tokens=prompt_tokens,
        repeats=repeats,
    )
    from orthorank.demo import run_demo  # after the checks above, which are quick

    screen = RichScreen(console())
    results = run_demo(settings, screen)
    screen.table(table(results))
    screen.say(words.verdict(results))
    screen.say(
        f"Report, results and plans: {output / 'report.html'}, {output / 'results.json'}, {output / 'orthorank.json'}"
    )
    return 0


def table(results: dict[str, Any]) -> "Table":
    """The rows of the results as a rich table."""
    drawn = table_of("", "layers changed", "perplexity", "tokens/s", "speed-up", "FLOP-ideal", left=2)
    for row in results["rows"]:
        drawn.add_row(*words.cells(row), style="bold" if row["name"] == "orthorank" else None)
    return drawn
