"""``python -m contrib.budget``: search for a mixed plan under a budget."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank import cli
from orthorank.commands import search
from orthorank.commands.screen import BOS, MODEL, number, ratios, register

if TYPE_CHECKING:
    from rich.table import Table

BUDGET = "The plan's layers cost at most this share of the dense ones, such as 0.8."
UNIT = "flops, or time as measured on this machine."
KEEP_RATIOS = "What a layer of the plan may keep; 0: it may be removed. Default: 0,1/4,1/3,1/2."
START = (
    "Plan to begin from, may be given more than once; none: only the dense model. Default: those of OrthoRank "
    "(--keep-ratio) and of layer pruning at the same sparsity are searched first."
)
EXCHANGES = "Exchanges of steps that are tried at each cost. Default: 48."
PROMPT_TOKENS = "Prompt length for which the cost of a layer counts. Default: 2048."
KEEP_RATIO = "Keep ratio of the OrthoRank plan to begin from. Default: 1/3."


def command(
    budget: Annotated[str, typer.Option(help=BUDGET)],
    model: Annotated[str | None, typer.Argument(help=MODEL, show_default=False)] = None,
    budget_unit: Annotated[str, typer.Option(help=UNIT)] = "flops",
    keep_ratios: Annotated[str | None, typer.Option(help=KEEP_RATIOS)] = None,
    start: Annotated[list[str] | None, typer.Option(help=START)] = None,
    exchanges: Annotated[int | None, typer.Option(help=EXCHANGES)] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help=PROMPT_TOKENS)] = None,
    keep_ratio: Annotated[str | None, typer.Option(help=KEEP_RATIO)] = None,
    text: Annotated[Path | None, typer.Option(help=search.TEXT)] = None,
    dataset: Annotated[str | None, typer.Option(help=search.DATASET)] = None,
    windows: Annotated[int | None, typer.Option(help=search.WINDOWS)] = None,
    window: Annotated[int | None, typer.Option(help=search.SEQ_LEN)] = None,
    protect_first: Annotated[int | None, typer.Option(help=search.FIRST)] = None,
    protect_last: Annotated[int | None, typer.Option(help=search.LAST)] = None,
    no_sink_floor: Annotated[bool, typer.Option("--no-sink-floor", help=search.FLOOR)] = False,
    sink_layer: Annotated[int | None, typer.Option(help=search.SINK_LAYER)] = None,
    criterion: Annotated[str, typer.Option(help=search.CRITERION)] = "orthogonal",
    fast: Annotated[bool, typer.Option("--fast", help="Of the plans to begin from: not exact, quicker.")] = False,
    correct: Annotated[int | None, typer.Option(help=search.CORRECT)] = None,
    fit_windows: Annotated[int | None, typer.Option(help=search.FIT_WINDOWS)] = None,
    output: Annotated[Path, typer.Option(help="Folder for the plan, the front and the state.")] = search.OUTPUT,
    resume: Annotated[bool, typer.Option("--resume", help=search.RESUME)] = False,
    bos: Annotated[str, typer.Option(help=BOS)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    device_map: Annotated[str | None, typer.Option(help=search.DEVICE_MAP)] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=search.BATCH)] = None,
    memory: Annotated[float | None, typer.Option(help=search.MEMORY)] = None,
) -> int:
    """Choose for each layer whether it is dense, selects tokens at one of several keep ratios, or is removed."""
    from contrib.budget.settings import BudgetSettings
    from orthorank.search.settings import KEEP_RATIO as DEFAULT_RATIO

    share, ratio = number("budget", budget), number("keep_ratio", keep_ratio)
    assert share is not None
    settings = BudgetSettings(
        output=output,
        model=model,
        keep_ratio=DEFAULT_RATIO if ratio is None else ratio,
        criterion=register([criterion])[0],
        text=text,
        dataset=dataset,
        windows=windows,
        window=window,
        bos=bos,
        protect_first=protect_first,
        protect_last=protect_last,
        sink_floor=False if no_sink_floor else None,
        sink_layer=sink_layer,
        fast=fast,
        correct=correct,
        fit_windows=fit_windows,
        resume=resume,
        device=device,
        device_map=device_map,
        dtype=dtype,
        batch_size=batch_size,
        memory=memory,
        budget=share,
        budget_unit=budget_unit,
        keep_ratios=ratios("keep_ratios", keep_ratios),
        starts=tuple(start or ()),
        exchanges=exchanges,
        prompt_tokens=prompt_tokens,
    )
    from contrib.budget.job import run_search

    return search.run(output, lambda screen: run_search(settings, screen), table)


def table(results: dict[str, Any]) -> "Table":
    """The dense model, the plans that the search began from and the mixed plan as a rich table."""
    return search.table(results, changes=lambda row: row["changes"], cost=lambda row: f"{row['cost']:.3f}")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own) and return its exit code."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(cli.bounded(command))
    return cli.answer(lambda: app, arguments, "python -m contrib.budget")


if __name__ == "__main__":
    sys.exit(main())
