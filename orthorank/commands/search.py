"""``orthorank search``: choose the layers of a plan."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands.criterion import register
from orthorank.commands.demo import BOS, MODEL
from orthorank.common.errors import OrthoRankError

if TYPE_CHECKING:
    from rich.table import Table

    from orthorank.search.settings import SearchSettings

OUTPUT = Path("orthorank-search")
METHOD = "greedy (SLEB: one layer after the other), one-shot (Shortened LLaMA) or influence (ShortGPT)."
METRIC = "Of one-shot: ppl, taylor or magnitude. Default: ppl."
KEEP_RATIO = "Share of the tokens that a chosen layer still updates; 0 removes the layer. Default: 1/3."
SPARSITY = "Share of token updates to leave out, over all layers. Default: 0.2."
LAYERS = "Number of layers to choose, instead of a sparsity."
TEXT = "UTF-8 text file to calibrate on. Default: the documentation of Python inside its standard library."
DATASET = "wikitext2 or c4, by the package datasets; wikitext2:FOLDER reads a copy that is already here."
WINDOWS = "Calibration windows. Default: 4; with wikitext2 all that its 128 lines fill."
SEQ_LEN = "Tokens of a calibration window. Default: 512; with a dataset 2048."
FIRST = "Layers at the beginning that are never chosen. Default: greedy 1, one-shot 4, influence 0."
LAST = "Layers at the end that are never chosen. Default: 2; layer removal: greedy 1, one-shot 2, influence 0."
FLOOR = "Let layers select tokens that come before the sink forms, too."
SINK_LAYER = "Choose layers after this one, instead of the one in which the sink was found to form."
CRITERION = "By which a chosen layer selects tokens: a name, or module:function for one of your own."
FAST = "Successive halving over the windows: several times quicker, not exact."
RESUME = "Go on with the search whose state is in the output folder; begin one if there is none."
DEVICE_MAP = "auto: spread a model that one device cannot hold, by accelerate."
BATCH = "Windows in one forward. Default: as memory allows."
MEMORY = "GiB of hidden states to keep; others are computed again. Default: a quarter of the free memory."
BUDGET = "Search for a mixed plan instead: its layers cost at most this share of the dense ones, such as 0.8."
BUDGET_UNIT = "flops, or time as measured on this machine. Default: flops."
KEEP_RATIOS = "What a layer of a mixed plan may keep; 0: it may be removed. Default: 0,1/4,1/3,1/2."
START = (
    "Plan to begin a mixed search from, may be given more than once; none: only the dense model. Default: those of "
    "OrthoRank (--keep-ratio) and of layer pruning at the same sparsity are searched first."
)
EXCHANGES = "Exchanges of steps that a mixed search tries at each cost. Default: 48."
PROMPT_TOKENS = "Prompt length for which the cost of a layer counts. Default: 2048."


def command(
    model: Annotated[str | None, typer.Argument(help=MODEL, show_default=False)] = None,
    method: Annotated[str, typer.Option(help=METHOD)] = "greedy",
    metric: Annotated[str | None, typer.Option(help=METRIC)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    sparsity: Annotated[str | None, typer.Option(help=SPARSITY)] = None,
    layers: Annotated[int | None, typer.Option(help=LAYERS)] = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    dataset: Annotated[str | None, typer.Option(help=DATASET)] = None,
    windows: Annotated[int | None, typer.Option(help=WINDOWS)] = None,
    seq_len: Annotated[int | None, typer.Option(help=SEQ_LEN)] = None,
    protect_first: Annotated[int | None, typer.Option(help=FIRST)] = None,
    protect_last: Annotated[int | None, typer.Option(help=LAST)] = None,
    no_sink_floor: Annotated[bool, typer.Option("--no-sink-floor", help=FLOOR)] = False,
    sink_layer: Annotated[int | None, typer.Option(help=SINK_LAYER)] = None,
    criterion: Annotated[str, typer.Option(help=CRITERION)] = "orthogonal",
    fast: Annotated[bool, typer.Option("--fast", help=FAST)] = False,
    output: Annotated[Path, typer.Option(help="Folder for the plan (orthorank.json) and the state.")] = OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help=RESUME)] = False,
    bos: Annotated[str, typer.Option(help=BOS)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help=DEVICE_MAP)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=BATCH)] = None,
    memory: Annotated[float | None, typer.Option(help=MEMORY)] = None,
    budget: Annotated[str | None, typer.Option(help=BUDGET)] = None,
    budget_unit: Annotated[str | None, typer.Option(help=BUDGET_UNIT)] = None,
    keep_ratios: Annotated[str | None, typer.Option(help=KEEP_RATIOS)] = None,
    start: Annotated[list[str] | None, typer.Option(help=START)] = None,
    exchanges: Annotated[int | None, typer.Option(help=EXCHANGES)] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help=PROMPT_TOKENS)] = None,
) -> int:
    """Choose the layers of a plan and write it to orthorank.json.

    The loss of every evaluation is kept in the output folder: after an interruption, the same command with --resume
    goes on where it stopped. Several processes (accelerate launch -m orthorank search ...) share the windows.
    """
    from orthorank.commands.screen import number, ratios
    from orthorank.search.settings import KEEP_RATIO as DEFAULT_RATIO
    from orthorank.search.settings import SearchSettings

    ratio = number("keep_ratio", keep_ratio)
    settings = SearchSettings(
        output=output,
        model=model,
        method=method,
        metric=metric,
        keep_ratio=DEFAULT_RATIO if ratio is None else ratio,
        criterion=register([criterion])[0],
        sparsity=number("sparsity", sparsity),
        layers=layers,
        text=text,
        dataset=dataset,
        windows=windows,
        seq_len=seq_len,
        bos=bos,
        protect_first=protect_first,
        protect_last=protect_last,
        sink_floor=False if no_sink_floor else None,
        sink_layer=sink_layer,
        fast=fast,
        resume=resume,
        device=device,
        device_map=device_map,
        dtype=dtype,
        batch_size=batch_size,
        memory=memory,
        budget=number("budget", budget),
        budget_unit=budget_unit,
        keep_ratios=ratios("keep_ratios", keep_ratios),
        starts=tuple(start or ()),
        exchanges=exchanges,
        prompt_tokens=prompt_tokens,
    )
    return run(settings)


def run(settings: "SearchSettings") -> int:
    """Search, and print what came out; of several processes the first one prints, errors included."""
    from rich.padding import Padding

    from orthorank.commands.screen import INDENT, RichScreen, console
    from orthorank.search.distributed import launched_rank
    from orthorank.search.run import run_search

    terminal = console(quiet=launched_rank() > 0)
    screen = RichScreen(terminal)
    try:
        results = run_search(settings, screen)
    except OrthoRankError:
        if launched_rank() > 0:
            return 2  # rank 0 says the same
        raise
    terminal.print()
    terminal.print(Padding(table(results), (0, 0, 1, INDENT)))
    screen.say(f"Plan: {results['plan_file']}; use it with orthorank demo --plan {settings.output}")
    return 0


def table(results: dict[str, Any]) -> "Table":
    """The dense model and the plan as a rich table."""
    from rich.table import Table

    from orthorank.common import format as words

    mixed = any("changes" in row for row in results["rows"])
    heads = (
        "",
        "layers changed",
        "calibration loss",
        "held-out perplexity",
        "FLOP-ideal",
        *(["cost"] if mixed else []),
    )
    drawn = Table(box=None, pad_edge=False, header_style="dim")
    for head in heads:
        drawn.add_column(head, justify="right" if head not in heads[:2] else "left")
    for row in results["rows"]:
        loss = "" if row["loss"] is None else f"{row['loss']:.4f}"
        cost = [f"{row['cost']:.3f}"] if mixed else []
        figures = (loss, words.figure(row["perplexity"]), f"{row['flop_speedup']:.2f}x", *cost)
        drawn.add_row(row["name"], row.get("changes") or words.layers(row["layers"]), *figures)
    return drawn
