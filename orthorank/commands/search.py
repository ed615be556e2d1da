"""``orthorank search``: choose the layers of a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands import BosChoice, Device, DeviceMap, Dtype, Model, number, register
from orthorank.commands.screen import RichScreen, call, console, table_of
from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.texts import find_text, remark_on

if TYPE_CHECKING:
    from rich.table import Table

OUTPUT = Path("orthorank-search")
METHOD = "greedy (SLEB: one layer after the other), one-shot (Shortened LLaMA) or influence (ShortGPT)."
METRIC = "How one-shot scores a layer: ppl, taylor or magnitude. Default: ppl."
KEEP_RATIO = "Share of the tokens that a chosen layer still updates; 0 removes the layer. Default: 1/3."
SPARSITY = "Share of token updates to leave out, over all layers. Default: 0.1."
LAYERS = "Number of layers to choose, instead of a sparsity."
TEXT = "UTF-8 text file to calibrate on. Default: the documentation of Python inside its standard library."
DATASET = "Calibrate on wikitext2 or c4, by the package datasets; wikitext2:FOLDER reads a local copy."
WINDOWS = "Number of calibration windows. Default: 4; with wikitext2 as many as its 128 rows fill."
SEQ_LEN = "Tokens of a calibration window. Default: 512; with a dataset 2048."
FIRST = "Layers at the beginning that are never chosen. Default: greedy 1, one-shot 4, influence 0."
LAST = "Layers at the end that are never chosen. Default: 2; layer removal: greedy 1, one-shot 2, influence 0."
FLOOR = "Also choose among the layers before the one in which the sink forms."
SINK_LAYER = "Choose layers after this one, instead of the one in which the sink was found to form."
CRITERION = "What a chosen layer ranks tokens by: a name, or module:function for one of your own."
SELECT = "How a chosen layer selects: topk, the best of the prompt, or window, the best of each selection window."
SELECT_WINDOW = "Tokens of a selection window. Default: 64."
CORRECT = "Evaluate every plan with maps of this rank (see orthorank correct). With --method greedy only."
FIT_WINDOWS = "Windows to fit maps on, in addition to --windows. Default: twice as many."
MAX_LOSS = (
    "Choose as many layers as this rise of the held-out loss allows, in nats a token, two standard errors included; "
    "exit code 1 if none passes. --sparsity or --layers limits how many are tried. With --method greedy only."
)
FAST = "Drop poor candidates after a few windows (successive halving): several times faster, not exact."
RESUME = "Go on with the search whose state is in the output folder; begin one if there is none."
BATCH = "Windows in one forward. Default: as memory allows."
MEMORY = "GiB of hidden states to keep in memory; others are computed again. Default: a quarter of what is free."


def command(
    model: Model = None,
    method: Annotated[str, typer.Option(help=METHOD)] = "greedy",
    metric: Annotated[str | None, typer.Option(help=METRIC)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    sparsity: Annotated[str | None, typer.Option(help=SPARSITY)] = None,
    layers: Annotated[int | None, typer.Option(help=LAYERS)] = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    dataset: Annotated[str | None, typer.Option(help=DATASET)] = None,
    windows: Annotated[int | None, typer.Option(help=WINDOWS)] = None,
    window: Annotated[int | None, typer.Option(help=SEQ_LEN)] = None,
    protect_first: Annotated[int | None, typer.Option(help=FIRST)] = None,
    protect_last: Annotated[int | None, typer.Option(help=LAST)] = None,
    no_sink_floor: Annotated[bool, typer.Option("--no-sink-floor", help=FLOOR)] = False,
    sink_layer: Annotated[int | None, typer.Option(help=SINK_LAYER)] = None,
    criterion: Annotated[str, typer.Option(help=CRITERION)] = "orthogonal",
    select: Annotated[str, typer.Option(help=SELECT)] = "topk",
    select_window: Annotated[int | None, typer.Option(help=SELECT_WINDOW)] = None,
    fast: Annotated[bool, typer.Option("--fast", help=FAST)] = False,
    correct: Annotated[int | None, typer.Option(help=CORRECT)] = None,
    fit_windows: Annotated[int | None, typer.Option(help=FIT_WINDOWS)] = None,
    max_loss: Annotated[str | None, typer.Option(help=MAX_LOSS)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the plan (orthorank.json) and the state.")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    bos: BosChoice = "auto",
    device: Device = "auto",
    device_map: DeviceMap = None,
    dtype: Dtype = None,
    batch_size: Annotated[int | None, typer.Option(help=BATCH)] = None,
    memory: Annotated[float | None, typer.Option(help=MEMORY)] = None,
) -> int:
    """Choose the layers of a plan and write it to orthorank.json.

    The loss of every evaluation is kept in the output folder: after an interruption, the same command with --resume
    goes on where it stopped. Several processes (accelerate launch -m orthorank search ...) share the windows.
    """
    options = dict(locals())  # they have the names of the settings' fields; a debugger changes what locals() gives
    from orthorank.search.settings import KEEP_RATIO as DEFAULT_RATIO
    from orthorank.search.settings import SearchSettings

    ratio = number("keep_ratio", keep_ratio)
    options |= {
        "keep_ratio": DEFAULT_RATIO if ratio is None else ratio,
        "criterion": register([criterion])[0],
        "sparsity": number("sparsity", sparsity),
        "sink_floor": False if options.pop("no_sink_floor") else None,
        "max_loss": number("--max-loss", max_loss),
    }
    settings = SearchSettings(**options)
    from orthorank.search.job import NothingWithin
    from orthorank.search.run import run_search  # after the checks above, which need no torch
    from orthorank.stack.resources import launched_rank

    screen = RichScreen(console(quiet=launched_rank() > 0))  # of several processes the first one prints
    try:
        if dataset is None and (remark := remark_on(find_text(text))) is not None:
            screen.say(remark)
        results = run_search(settings, screen)
    except NothingWithin as none:
        screen.table(prefix_table(none.prefixes))
        screen.say(f"{words.capital(str(none))}.")
        return 1
    except OrthoRankError:
        if launched_rank() > 0:
            return 2  # rank 0 says the same
        raise
    show(screen, results, call("demo", model, "--plan", output))
    return 0


def show(screen: RichScreen, results: dict[str, Any], use: str) -> None:
    """Print what came out; ``use``: the command that uses the plan."""
    if results.get("prefixes"):
        screen.table(prefix_table(results["prefixes"]))
    drawn = table_of("", "layers changed", "calibration loss", "held-out perplexity", "FLOP bound", left=2)
    for row in results["rows"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        figures = words.figure(row["perplexity"]), f"{row['flop_speedup']:.2f}x"
        drawn.add_row(row["name"], words.layers(row["layers"]), loss, *figures)
    screen.table(drawn)
    screen.say(f"Plan: {results['plan_file']}; use it with {use}")


def prefix_table(prefixes: list[dict[str, Any]]) -> "Table":
    """The plans of a path that were measured on held-out windows."""
    drawn = table_of("layers changed", "FLOPs of dense", "rise of the loss", "plus two errors")
    for row in prefixes:
        spread = f"{row['mean']:+.4f} ± {row['standard_error']:.4f}"
        drawn.add_row(words.layers(row["layers"]), f"{row['flops']:.3f}", spread, f"{row['most']:.4f}")
    return drawn
