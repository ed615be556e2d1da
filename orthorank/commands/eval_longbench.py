"""``orthorank eval longbench``: LongBench's sixteen English and code tasks, dense or with a plan."""

import hashlib
import json as json_module
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from orthorank.commands import BosChoice, Criteria, Device, Dtype, Model, names, register
from orthorank.commands.loading import load
from orthorank.commands.screen import RichScreen, console, print_json, table_of
from orthorank.common.errors import OrthoRankError, check_integers
from orthorank.common.files import writable_folder, write_json
from orthorank.common.progress import say_replaced
from orthorank.common.texts import Bos, check_bos

OUTPUT = Path("orthorank-longbench")
PLAN = "Plan: a file, a folder, or org/name@revision on the Hub. Default: the dense model."
DATA = "JSONL file with task, prompt and gold in each line. Default: LongBench from the Hub."
TASKS = "Tasks, such as qasper,trec. Default: all that the data has."
MAX_TOKENS = "Most tokens of prompt and answer; longer prompts lose their middle. Default: the model's context."
SHORT = "Leave out prompts with more tokens than this."


def command(
    model: Model = None,
    plan: Annotated[str | None, typer.Option(help=PLAN)] = None,
    criterion: Criteria = None,
    data: Annotated[Path | None, typer.Option(help=DATA)] = None,
    tasks: Annotated[str | None, typer.Option(help=TASKS)] = None,
    limit: Annotated[int | None, typer.Option(help="First N questions of each task only. Default: all.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help=MAX_TOKENS)] = None,
    only_shorter: Annotated[int | None, typer.Option(help=SHORT)] = None,
    bos: BosChoice = "auto",
    device: Device = "auto",
    dtype: Dtype = None,
    output: Annotated[Path, typer.Option(help="Folder for answers.jsonl and longbench.json.")] = OUTPUT,
    json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> int:
    """Answer LongBench's questions greedily and score them with its own metrics.

    Each answer is kept at once: the same command goes on where it was stopped.
    """
    from orthorank.config import OrthoRankConfig
    from orthorank.evaluation.answer_cache import tokenizer_fingerprint
    from orthorank.evaluation.kept import going_on, kept_rows
    from orthorank.evaluation.longbench import metrics
    from orthorank.evaluation.longbench_run import run_longbench
    from orthorank.hf.apply import apply
    from orthorank.stack.layers import config_fingerprint, model_fingerprint

    given = {"limit": limit, "max_tokens": max_tokens, "only_shorter": only_shorter}
    check_integers(given, limit=1, max_tokens=1, only_shorter=1)
    check_bos(bos)
    register(criterion)
    chosen = None if plan is None else OrthoRankConfig.from_pretrained(plan)
    metrics()
    questions = _questions(data, tasks, limit)
    folder = writable_folder(output)
    screen = RichScreen(console(stderr=json))
    say_replaced(screen, folder, "longbench.json")
    answers = folder / "answers.jsonl"
    kept_rows(answers, answer=str)  # complains, if at all, before the model is loaded
    loaded, tokenizer, info = load(screen, model, device, dtype)
    if only_shorter is not None:
        questions = [q for q in questions if len(tokenizer(q.prompt, verbose=False)["input_ids"]) <= only_shorter]
        if not questions:
            raise OrthoRankError(f"only_shorter is {only_shorter}, and every prompt has more tokens; raise it")
    Bos.of(bos, tokenizer)  # complains before the first answer
    about = [info.name, model_fingerprint(loaded), info.dtype, None if chosen is None else chosen.to_dict()]
    by = [config_fingerprint(loaded), tokenizer_fingerprint(tokenizer)]
    identity, before = (hashlib.sha256(json_module.dumps(each).encode()).hexdigest() for each in ([*about, *by], about))
    with (
        nullcontext() if chosen is None else apply(loaded, chosen),
        screen.progress("LongBench", len(questions)) as advance,
        going_on(f"the answers so far are in {answers}"),
    ):
        scores = run_longbench(
            loaded,
            tokenizer,
            questions,
            max_tokens=max_tokens,
            bos=bos,
            answers=answers,
            identity=identity,
            before=before,
            on_answer=lambda done, _, question, value: advance(done, f"{question.task}: {100 * value:.0f}"),
        )
    plan_fields = None if chosen is None else chosen.to_dict()
    results = {"model": info.to_dict(), "plan": plan_fields, "data": str(data or "hub"), "max_tokens": max_tokens}
    results |= {"only_shorter": only_shorter, "bos": bos, "scores": scores}
    write_json(folder / "longbench.json", results)
    if json:
        print_json(results)
    else:
        _show(screen, results, folder)
    return 0


def _questions(data: Path | None, tasks: str | None, limit: int | None) -> list[Any]:
    from orthorank.evaluation.longbench import TASKS, hub_questions, local_questions, task_of

    asked = list(TASKS) if tasks is None else list(names(tasks))
    for name in asked:
        task_of(name)
    found = local_questions(data) if data is not None else hub_questions(asked)
    chosen: list[Any] = []
    counts: dict[str, int] = {}
    for question in found:
        if question.task in asked and (limit is None or counts.get(question.task, 0) < limit):
            counts[question.task] = counts.get(question.task, 0) + 1
            chosen.append(question)
    if not chosen:
        raise OrthoRankError(f"data {str(data)!r} has no question of the tasks {', '.join(asked)}")
    return chosen


def _show(screen: RichScreen, results: dict[str, Any], folder: Path) -> None:
    scores = results["scores"]
    screen.heading(f"{results['model']['name']}, {'dense' if results['plan'] is None else 'with a plan'}: LongBench")
    drawn = table_of("task", "questions", "score")
    for name, mean in scores["tasks"].items():
        drawn.add_row(name, str(scores["questions"][name]), f"{mean:.2f}")
    for group, mean in scores["groups"].items():
        drawn.add_row(group, "", f"{mean:.2f}", style="dim")
    drawn.add_row("mean of the tasks", "", f"{scores['mean']:.2f}", style="bold")
    screen.table(drawn)
    said = {"auto": "BOS where tokenizer and template put it", "none": "no BOS"}
    screen.say(f"Prompts: {said.get(results['bos'], 'BOS before each')}.")
    screen.say(f"Results: {folder / 'longbench.json'}, {folder / 'answers.jsonl'}")
