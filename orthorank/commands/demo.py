"""``orthorank demo``: the main job on a real model, with a table at the end and a report beside it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from orthorank.commands import BosChoice, Device, Model, number, numbers
from orthorank.commands.compare import compared_table
from orthorank.commands.screen import RichScreen, console, table_of
from orthorank.common.errors import OrthoRankError
from orthorank.report import words

OUTPUT = Path("orthorank-demo")
TEXT = "UTF-8 text file. Default: the documentation of Python inside its standard library."
PLAN = (
    "default (the plans shipped for the model), search, or the path of a plan. Without it: default where some are "
    "shipped, else search."
)
SEARCH = "Search the layers even if plans are shipped for the model: the same as --plan search."
SPARSITY = "Share of token updates to leave out, over all layers, by OrthoRank and layer pruning alike. Default: 0.1."
WINDOWS = "Calibration windows: layers are searched and maps fitted on them, for pruning and OrthoRank alike."
RANK = "Rank of the maps of the corrected plans; 0 leaves these plans out, unless a plan comes with maps."
KEEP_RATIO = "Share of the tokens that a chosen layer still updates, in a search or with --layers. Default: 1/3."
LAYERS = "Select in these layers instead of searching, such as 12,14 or 12-16,20."
PROMPTS = (
    "File of prompts, in the format of orthorank compare: the report has the answers of all plans side by side, and KL "
    "divergences. Default: two short prompts."
)
OWN_PROMPTS = Path(__file__).parent.parent / "demo" / "prompts.txt"
SINK_LAYER = "Search after this layer, instead of the one in which the sink was found to form."


def command(
    model: Model = None,
    named: Annotated[str | None, typer.Option("--model", help="The same as the argument.", show_default=False)] = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    plan: Annotated[str | None, typer.Option(help=PLAN)] = None,
    search: Annotated[bool, typer.Option("--search", help=SEARCH)] = False,
    output: Annotated[Path, typer.Option(help="Folder for report.html, results.json and the plans.")] = OUTPUT,
    sparsity: Annotated[str | None, typer.Option(help=SPARSITY)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    windows: Annotated[int, typer.Option(help=WINDOWS)] = 8,
    window: Annotated[int, typer.Option(help="Tokens of a calibration window.")] = 512,
    rank: Annotated[int, typer.Option(help=RANK)] = 64,
    bos: BosChoice = "auto",
    device: Device = "auto",
    layers: Annotated[str | None, typer.Option(help=LAYERS)] = None,
    sink_layer: Annotated[int | None, typer.Option(help=SINK_LAYER)] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of the prompt whose prefill is timed.")] = 2048,
    rounds: Annotated[int, typer.Option(help="Timed runs of each variant.")] = 3,
    prompts: Annotated[Path, typer.Option(help=PROMPTS, show_default=False)] = OWN_PROMPTS,
) -> int:
    """Take or find a plan, measure it against layer pruning, and write a report.

    Looks at the model's sink token, takes the plans shipped for it (or chooses layers by greedy search), fits maps that
    correct them, and measures perplexity and prefill speed of the dense model, of layer pruning (SLEB) and of OrthoRank
    at the same sparsity, plain and corrected. Both methods are searched and fitted on the same tokens.
    """
    if search and plan not in (None, "search"):
        raise OrthoRankError(f"both --search and --plan ({plan}) say where the layers come from; give one of them")
    if model is not None and named is not None:
        raise OrthoRankError(f"the model is named twice, {model!r} and --model {named!r}; name it once")
    from orthorank.demo.settings import Settings

    settings = Settings(
        output=output,
        model=model or named,
        text=text,
        plan="search" if search else "auto" if plan is None else plan,
        sparsity=number("sparsity", sparsity),
        keep_ratio=number("keep_ratio", keep_ratio),
        windows=windows,
        window=window,
        rank=rank,
        bos=bos,
        device=device,
        layers=numbers("layers", layers),
        sink_layer=sink_layer,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        prompts=prompts,
    )
    from orthorank.demo import run_demo  # after the checks above, which are quick

    screen = RichScreen(console())

    def show(results: dict[str, Any]) -> None:
        drawn = table_of("", "layers changed", "perplexity", "nats above dense", left=2)
        for row in results["rows"]:
            drawn.add_row(*words.quality_cells(row))
        screen.table(drawn)
        for sentence in words.differences(results):
            screen.say(f"{sentence} nats a token")

    results = run_demo(settings, screen, show)
    drawn = table_of("", "tokens/s", "speed-up", "FLOP bound")
    for row in results["rows"]:
        drawn.add_row(*words.speed_cells(row))
    screen.table(drawn)
    screen.say(
        "Speed-ups are medians over the rounds, in which all take turns; ±: half of the range between the quartiles."
    )
    if "compare" in results:
        screen.table(compared_table(results["compare"]))
    screen.say(words.verdict(results))
    files = [output / name for name in ("report.html", "results.json", "orthorank.json")]
    files += [output / "corrected"] if "corrected_plan_file" in results else []
    screen.say(f"Report, results and plans: {', '.join(map(str, files))}")
    return 0
