"""``orthorank eval tasks``: tasks of lm-evaluation-harness, with true lengths and the paper's mean."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orthorank.commands import BosChoice, Criteria, Device, Dtype, Model, names, register
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, console, print_json, table_of
from orthorank.common.errors import OrthoRankError, check_integers
from orthorank.common.files import writable_folder, write_json
from orthorank.common.progress import say_replaced
from orthorank.common.texts import check_bos

if TYPE_CHECKING:
    from rich.table import Table

TASKS = "Tasks of the harness, such as piqa,winogrande. Default: the paper's five."
PAPER = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"
PLAN = (
    "Plan: a file, a folder, or org/name@revision on the Hub; may be given several times. Default: the dense model "
    "alone."
)
DENSE = "Also measure the dense model and compare plans with it, not with the first. Default: with several plans."
OUTPUT = "Folder for the results; the same command goes on after the plans that are finished. Default: nothing is kept."
CONTEXT = "Select among the context's tokens only; the answer's tokens are dense."


def command(
    model: Model = None,
    plan: Annotated[list[str] | None, typer.Option(help=PLAN)] = None,
    dense: Annotated[bool | None, typer.Option("--dense/--no-dense", help=DENSE, show_default=False)] = None,
    criterion: Criteria = None,
    tasks: Annotated[str, typer.Option(help=TASKS, show_default=False)] = PAPER,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="First N rows of each task only. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at a time; results do not depend on it.")] = 8,
    context_only: Annotated[bool, typer.Option("--context-only", help=CONTEXT)] = False,
    bos: BosChoice = "auto",
    device: Device = "auto",
    dtype: Dtype = None,
    output: Annotated[Path | None, typer.Option(help=OUTPUT)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Zero-shot accuracy, dense or with plans, on tasks of lm-evaluation-harness, and the paper's mean.

    Of several plans the differences from the dense model are printed as well, paired row by row. The mean is over
    acc_norm where a task has it, else acc. Data come from the hub, or from --include-path's files.
    """
    from orthorank.evaluation.answer_cache import tokenizer_fingerprint
    from orthorank.evaluation.kept import KeptRows
    from orthorank.evaluation.task_scores import definition_of, evaluate_tasks, task_differences
    from orthorank.speed.bench import read_plans

    asked = names(tasks)
    check_integers({"limit": limit, "batch_size": batch_size}, limit=1, batch_size=1)
    if include_path is not None and not include_path.is_dir():
        raise OrthoRankError(f"include_path is {str(include_path)!r}, and there is no such folder")
    check_bos(bos)
    register(criterion)
    import orthorank.evaluation.tasks  # noqa: F401 - before a model is loaded: it says what to do without the harness

    folder = None if output is None else writable_folder(output)
    plans = read_plans(plan)
    dense = len(plans) > 1 if dense is None else dense
    screen = RichScreen(console(stderr=json))
    say_replaced(screen, folder, "tasks.json")
    kept = KeptRows(None if folder is None else folder / "tasks-rows.jsonl")
    loaded, tokenizer, info = load(screen, model, device, dtype, plans, plan)
    variants: dict[str, Any] = ({"dense": None} if dense or not plans else {}) | plans
    several = len(variants) > 1
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {"model": info.to_dict()}
    how: dict[str, Any] = {"limit": limit, "context_only": context_only, "bos": bos, "samples": several}
    about = how | definition_of(asked, include_path) | {"tokenizer": tokenizer_fingerprint(tokenizer)}
    for name, each in variants.items():

        def measured(each: Any = each) -> dict[str, Any]:
            given = how | {"include_path": include_path, "batch_size": batch_size}
            return evaluate_tasks(loaded, tokenizer, asked, plan=each, **given)

        found = kept.of_model(loaded, each, about, measured)
        if several:
            rows.append({"name": name} | found)
        else:
            results |= found
    if several:
        results |= {"rows": rows, "against": rows[0]["name"]}
        results["differences"] = {row["name"]: task_differences(rows[0], row) for row in rows[1:]}
    if folder is not None:
        write_json(folder / "tasks.json", results)
    if json:
        print_json(results)
    else:
        _show(screen, results, folder)
    return 0


def _show(screen: RichScreen, results: dict[str, Any], folder: Path | None) -> None:
    rows = results.get("rows", [results])
    first, several = rows[0], len(rows) > 1
    of = ", ".join(row["name"] for row in rows) if several else "dense" if first["plan"] is None else "with a plan"
    screen.heading(f"{results['model']['name']}{':' if several else ','} {of}")
    screen.table(_compared(results) if several else _accuracies(results))
    if several:
        screen.say(f"Beneath: the difference from {first['name']}, paired row by row, with its standard error.")
    screen.say(f"Requests begin with {'BOS' if first['bos'] else 'no BOS'}.")
    for row in rows:
        if (share := row["last_token_selected"]) is not None:
            begin = f"{row['name']}: the" if several else "The"
            updated = f"{100 * share:.1f} % of the cases"
            screen.say(f"{begin} last token of a request was among those that a layer updated in {updated}.")
    if folder is not None:
        screen.say(f"Results: {folder / 'tasks.json'}")


def _compared(results: dict[str, Any]) -> "Table":
    """Accuracies of all, and beneath each what it is more than the first, paired row by row."""
    rows, first = results["rows"], results["rows"][0]
    drawn = table_of("task", "rows", "metric", *(row["name"] for row in rows))
    for number, task in enumerate(first["tasks"]):
        values = [f"{100 * row['tasks'][number]['value']:.2f}" for row in rows]
        drawn.add_row(task["task"], str(task["rows"]), task["metric"], *values)
        drawn.add_row("", "", "", "", *(_difference(results, row, number) for row in rows[1:]), style="dim")
    drawn.add_row("mean", "", "", *(f"{100 * row['mean']:.2f}" for row in rows), style="bold")
    drawn.add_row("", "", "", "", *(_difference(results, row) for row in rows[1:]), style="dim")
    return drawn


def _difference(results: dict[str, Any], row: dict[str, Any], task: int | None = None) -> str:
    found = results["differences"][row["name"]]
    found = found if task is None else found["tasks"][task]
    if found["mean"] is None:
        return "-"
    error = found["standard_error"]
    return f"{100 * found['mean']:+.2f}" + (f" ± {100 * error:.2f}" if error == error else "")


def _accuracies(results: dict[str, Any]) -> "Table":
    drawn = table_of("task", "rows", "metric", "accuracy", "standard error")
    for row in results["tasks"]:
        error = "-" if row["standard_error"] is None else f"{100 * row['standard_error']:.2f}"
        drawn.add_row(row["task"], str(row["rows"]), row["metric"], f"{100 * row['value']:.2f}", error)
    drawn.add_row("mean", "", "", f"{100 * results['mean']:.2f}", "", style="bold")
    return drawn
