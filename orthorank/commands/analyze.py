"""``orthorank analyze``: the paper's figures, of any model and text."""

from pathlib import Path
from typing import Annotated

import typer

from orthorank.commands import BosChoice, Device, Dtype, Model, number, register
from orthorank.commands.screen import RichScreen, console
from orthorank.common.errors import OrthoRankError

OUTPUT = Path("orthorank-analysis")
TEXT = "UTF-8 text file. Default: the documentation of Python inside its standard library."
PLANS = (
    "Plan whose layers are drawn: a file, a folder, or org/name@revision on the Hub; may be given several times. "
    "Default: the shipped ones, if any."
)
CRITERION = "What Figure 4 compares the orthogonal criterion with: a name, or module:function."


def command(
    model: Model = None,
    text: Annotated[Path | None, typer.Option(help=TEXT)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the figures and analysis.json.")] = OUTPUT,
    plan: Annotated[list[str] | None, typer.Option(help=PLANS)] = None,
    criterion: Annotated[str, typer.Option(help=CRITERION)] = "inverse",
    passages: Annotated[int, typer.Option(help="Passages of text for the similarities.")] = 64,
    passage_tokens: Annotated[int, typer.Option(help="Tokens of a passage.")] = 32,
    windows: Annotated[int, typer.Option(help="Windows for Figure 4, layer by layer; 0 leaves it out.")] = 4,
    window: Annotated[int, typer.Option(help="Tokens of such a window.")] = 512,
    keep_ratio: Annotated[str, typer.Option(help="Share of tokens that a layer updates there.")] = "1/3",
    bos: BosChoice = "auto",
    device: Device = "auto",
    dtype: Dtype = None,
) -> int:
    """Draw the paper's figures of any model, as PNG and SVG, and write the numbers behind them as JSON.

    Similarities with the sink token (Figures 2 and 7) and across layers (3 and 6), selection layer by layer (4), and
    the chosen layers of plans (5).
    """
    options = dict(locals())  # they have the names of the settings' fields; a debugger changes what locals() gives
    from orthorank.analysis.job import AnalysisSettings, run_analysis

    ratio = number("keep_ratio", keep_ratio)
    if ratio is None or not 0 < ratio < 1:
        raise OrthoRankError(f"keep_ratio is {keep_ratio!r}; it must be above 0 and below 1, such as 1/3")
    options |= {"keep_ratio": ratio, "criterion": register([criterion])[0], "plans": tuple(options.pop("plan") or ())}
    settings = AnalysisSettings(**options)
    run_analysis(settings, RichScreen(console()))
    return 0
