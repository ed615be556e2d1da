"""What the three ways of ``orthorank bench`` have in common."""

from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from orthorank.commands.screen import RichScreen, print_json, table_of
from orthorank.common.errors import OrthoRankError
from orthorank.report.words import doubts


def refuse(engine: str, reasons: Mapping[str, str], options: Mapping[str, Any]) -> None:
    """Those of ``options`` that mean nothing with ``engine``, for ``reasons`` by name, are not given.

    >>> refuse("--random-weights", {"lengths": "one is measured"}, {"lengths": "0"})
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: --lengths is not for --random-weights: one is measured; leave it out
    """
    for name, reason in reasons.items():
        if options[name] not in (None, "auto"):
            shown = name if name == "model" else f"--{name.replace('_', '-')}"
            raise OrthoRankError(f"{shown} is not for {engine}: {reason}; leave it out")


def counted(advance: Callable[[int, str], object]) -> Callable[[str, int, int], None]:
    """What a benchmark calls after each of its steps: moves a bar of all of them on by one."""
    steps = count(1)

    def on_step(what: str, number: int, of: int) -> None:
        advance(next(steps), f"{what} {number} of {of}")

    return on_step


def deliver(
    screen: RichScreen,
    results: dict[str, Any],
    folder: Path | None,
    *,
    as_json: bool,
    show: Callable[[RichScreen, dict[str, Any]], None],
) -> None:
    """Print the results, for a machine or (``show``) for people, and then write them to ``folder`` if there is one: on
    a full disk they are seen nevertheless.
    """
    from orthorank.speed.bench_results import write_results

    if as_json:
        print_json(results)
    else:
        show(screen, results)
    if folder is not None:
        write_results(folder, results)
        if not as_json:
            screen.say(f"Results: {folder / 'bench.json'}, {folder / 'bench.csv'}")


def show_rows(
    screen: RichScreen, rows: list[dict[str, Any]], rounds: int, columns: list[tuple[str, str]], legend: str
) -> None:
    """A table with a row for each variant, what its heads mean, and what speaks against its figures.

    Args:
        columns: each one's head, and the field of the rows that is in it.
    """
    drawn = table_of(*(head for head, _ in columns), no_wrap=True)
    for row in rows:
        drawn.add_row(*(_written(field, row[field], rounds) for _, field in columns))
    screen.table(drawn)
    screen.say(legend)
    for doubt in doubts(rows, "prefill_speedup"):
        screen.say(doubt)


def _written(field: str, value: Any, rounds: int) -> str:
    """A figure in its unit; of one round there is no spread."""
    if value is None or (field.endswith("_spread") and rounds < 2):
        return "-"
    if field == "nominal_sparsity":
        return f"{100 * value:.0f} %"
    if field == "peak_bytes":
        return f"{value / 2**20:,.0f}"
    if field.endswith("_seconds"):
        return f"{1000 * value:,.1f}"
    forms = {"speedup": ".2f", "spread": ".2f", "second": ",.1f" if field.startswith("decode") else ",.0f"}
    form, unit = forms.get(field.rpartition("_")[2], ""), "x" if field.endswith("_speedup") else ""
    return f"{value:{form}}{unit}"


def shipped(model: Any) -> dict[str, Any]:
    """The plans that come with the package for ``model`` (anything with its ``config``), by what they are."""
    from orthorank.plans import default_plans

    try:
        return default_plans(model)
    except OrthoRankError as error:
        raise OrthoRankError(f"{error}; or name the plans to measure with --plan") from error
