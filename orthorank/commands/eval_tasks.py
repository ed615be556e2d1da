"""``orthorank eval tasks``: tasks of lm-evaluation-harness, with true lengths and the paper's mean."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from orthorank.commands.screen import BOS, MODEL, OWN_CRITERION, RichScreen, console, register, table_of
from orthorank.common.errors import OrthoRankError, check_integers
from orthorank.common.files import write_json
from orthorank.common.texts import check_bos

TASKS = "Tasks of the harness, such as piqa,winogrande. Default: the paper's five."
PAPER = "piqa,winogrande,hellaswag,arc_easy,arc_challenge"
CONTEXT = "Select among the tokens of the context alone; the answer's tokens are dense."


def command(
    model: Annotated[str | None, typer.Argument(help=MODEL, show_default=False)] = None,
    plan: Annotated[
        str | None,
        typer.Option(help="Plan: a file, a folder, or org/name@revision on the Hub. Default: the dense model."),
    ] = None,
    criterion: Annotated[list[str] | None, typer.Option(help=OWN_CRITERION)] = None,
    tasks: Annotated[str, typer.Option(help=TASKS, show_default=False)] = PAPER,
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="First rows of each task. Default: all.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests at a time; results do not depend on it.")] = 8,
    context_only: Annotated[bool, typer.Option("--context-only", help=CONTEXT)] = False,
    bos: Annotated[str, typer.Option(help=BOS)] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Accuracy of a model with a plan on tasks of lm-evaluation-harness, without examples, and the paper's mean.

    The mean is over acc_norm where a task has it, else acc. Data come from the hub, or from --include-path's files.
    """

    from orthorank.commands.eval_ppl import check_output
    from orthorank.evaluation.task_scores import evaluate_tasks
    from orthorank.models import load_model, locate

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    check_integers({"limit": limit, "batch_size": batch_size}, limit=1, batch_size=1)
    if include_path is not None and not include_path.is_dir():
        raise OrthoRankError(f"include_path is {str(include_path)!r}, and there is no such folder")
    check_bos(bos)
    register(criterion)
    check_output(output)
    screen = RichScreen(console(stderr=json))
    with screen.progress(f"loading {locate(model).name}", 1):
        loaded, tokenizer, info = load_model(model, device, dtype)
    results = {"model": info.to_dict()} | evaluate_tasks(
        loaded,
        tokenizer,
        names,
        plan=plan,
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        context_only=context_only,
        bos=bos,
    )
    if output is not None:
        write_json(output, results)
    if json:
        print(json_module.dumps(results, indent=2))
        return 0
    _show(screen, results, output)
    return 0


def _show(screen: Any, results: dict[str, Any], output: Path | None) -> None:

    plan = results["plan"]
    screen.heading(f"{results['model']['name']}, {'dense' if plan is None else 'with a plan'}")
    drawn = table_of("task", "rows", "metric", "accuracy", "standard error")
    for row in results["tasks"]:
        error = row["standard_error"]
        drawn.add_row(
            row["task"],
            str(row["rows"]),
            row["metric"],
            f"{100 * row['value']:.2f}",
            "-" if error is None else f"{100 * error:.2f}",
        )
    drawn.add_row("mean", "", "", f"{100 * results['mean']:.2f}", "", style="bold")
    screen.table(drawn)
    screen.say(f"Requests begin with {'BOS' if results['bos'] else 'no BOS'}.")
    if plan is not None and results["last_token_selected"] is not None:
        screen.say(
            f"The last token of a request was among those that a layer updated in "
            f"{100 * results['last_token_selected']:.1f} % of the cases."
        )
    if output is not None:
        screen.say(f"Results: {output}")
