"""What the three ways of ``orthorank bench`` have in common."""

import json as json_module
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError


def counted(advance: Callable[[int, str], object]) -> Callable[[str, int, int], None]:
    """What a benchmark calls after each of its steps: moves a bar of all of them on by one."""
    steps = count(1)

    def on_step(what: str, number: int, of: int) -> None:
        advance(next(steps), f"{what} {number} of {of}")

    return on_step


def deliver(
    screen: Any, results: dict[str, Any], folder: Path | None, *, as_json: bool, show: Callable[[], None]
) -> int:
    """Print the results, for a machine or (``show``) for people, and then write them to ``folder`` if there is one: on
    a full disk they are seen nevertheless.
    """
    from orthorank.speed.bench_results import write_results

    if as_json:
        print(json_module.dumps(results, indent=2))
    else:
        show()
    if folder is not None:
        write_results(folder, results)
        if not as_json:
            screen.say(f"Results: {folder / 'bench.json'}, {folder / 'bench.csv'}")
    return 0


def shipped(model: Any) -> dict[str, Any]:
    """The plans that come with the package for ``model`` (anything with its ``config``), by what they are."""
    from orthorank.plans import default_plan

    try:
        return {"layer pruning": default_plan(model, "layer-pruning"), "orthorank": default_plan(model)}
    except OrthoRankError as error:
        raise OrthoRankError(f"{error}; or name the plans to measure with --plan") from error
