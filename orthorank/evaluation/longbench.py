"""LongBench's sixteen English and code tasks, by its own conventions: what is asked, how it is cut, how it is scored.

Prompts come ready-made from a local file, or from the hub with the templates that lm-evaluation-harness carries. A
prompt that is too long loses its middle; tasks with examples in the prompt and code tasks go without a chat template;
answers of the tasks with examples end at their first line; decoding is greedy. The metrics are LongBench's own
functions, as the harness carries them.
"""

import importlib
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from orthorank.common.errors import OrthoRankError, reason_of
from orthorank.common.files import from_json, user_path
from orthorank.evaluation.answers import greedy, with_bos
from orthorank.families.known import device_of
from orthorank_kernels.remedies import install

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HUB = "Xnhyacinth/LongBench"
CLASS_LINE = re.compile(r"^Type: (.+?)\s*$", re.MULTILINE)  # how trec's examples name their classes


@dataclass(frozen=True)
class Task:
    """One task's conventions.

    Args:
        group: the kind of task, whose mean LongBench states.
        metric: its scoring function in the harness's module ``tasks.longbench.metrics``.
        max_new_tokens: length of an answer.
        chat: whether the prompt goes into the tokenizer's chat template.
        first_line: whether the answer ends at its first line.
    """

    group: str
    metric: str
    max_new_tokens: int
    chat: bool = True
    first_line: bool = False


TASKS: dict[str, Task] = {
    "narrativeqa": Task("single-document QA", "qa_f1_score", 128),
    "qasper": Task("single-document QA", "qa_f1_score", 128),
    "multifieldqa_en": Task("single-document QA", "qa_f1_score", 64),
    "hotpotqa": Task("multi-document QA", "qa_f1_score", 32),
    "2wikimqa": Task("multi-document QA", "qa_f1_score", 32),
    "musique": Task("multi-document QA", "qa_f1_score", 32),
    "gov_report": Task("summarisation", "rouge_score", 512),
    "qmsum": Task("summarisation", "rouge_score", 512),
    "multi_news": Task("summarisation", "rouge_score", 512),
    "trec": Task("few-shot", "classification_score", 64, chat=False, first_line=True),
    "triviaqa": Task("few-shot", "qa_f1_score", 32, chat=False, first_line=True),
    "samsum": Task("few-shot", "rouge_score", 128, chat=False, first_line=True),
    "passage_count": Task("synthetic", "count_score", 32),
    "passage_retrieval_en": Task("synthetic", "retrieval_score", 32),
    "lcc": Task("code", "code_sim_score", 64, chat=False),
    "repobench-p": Task("code", "code_sim_score", 64, chat=False),
}


@dataclass(frozen=True)
class Question:
    """One row of a task.

    Args:
        task: a name in `TASKS`; index: the row's number in its task.
        prompt: instruction, context and question, as the model gets them (before a chat template).
        answers: the right ones; the best score over them counts. classes: all labels, where the task has labels.
    """

    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()


def local_questions(path: str | Path) -> list[Question]:
    """Questions of a JSONL file: ``task``, ``idx``, ``prompt``, ``gold`` (or ``answers``), perhaps ``all_classes``.

    ``gold`` may be an object that holds both. Where trec's rows do not say what classes there are, they are those that
    the examples in its prompts name.

    Raises:
        OrthoRankError: the file cannot be read, a line is no question or of no known task; the line is named.
    """
    file = user_path("data", path)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")  # not splitlines: JSON texts may hold U+2028
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OrthoRankError(f"data {str(path)!r} cannot be read: {reason}") from error
    questions = [_parsed(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise OrthoRankError(f"data {str(path)!r} holds no questions")
    named = {label for q in questions if q.task == "trec" for label in (*CLASS_LINE.findall(q.prompt), *q.answers)}
    return [
        Question(q.task, q.index, q.prompt, q.answers, tuple(sorted(named)))
        if q.task == "trec" and not q.classes
        else q
        for q in questions
    ]


def hub_questions(names: list[str]) -> Iterator[Question]:
    """Questions from the hub's copy of LongBench, with the templates of lm-evaluation-harness.

    Raises:
        OrthoRankError: the harness or its longbench requirements are missing, or the hub cannot be reached.
    """
    import datasets

    for name in names:
        template = hub_template(name)
        try:
            rows = list(datasets.load_dataset(HUB, name, split="test"))
        except Exception as error:  # of the hub, the library itself, or arrow
            raise OrthoRankError(
                f"LongBench's {name} cannot be loaded from the hub ({HUB}): {reason_of(error)}; where there is no "
                "network, name a JSONL file with --data"
            ) from error
        for index, row in enumerate(rows):
            yield Question(name, index, template(row), tuple(row["answers"]), tuple(row.get("all_classes") or ()))


def hub_template(name: str) -> Callable[[dict[str, Any]], str]:
    """What makes a prompt of a row of the hub's data: task ``name``'s template in lm-evaluation-harness.

    Raises:
        OrthoRankError: the harness is not installed, or its version has no such task.
    """
    task_of(name)
    metrics()  # raises when something is missing
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import apply_template

    entry: Any = TaskManager().task_index.get(f"longbench_{name}")
    template = getattr(entry, "cfg", {}).get("doc_to_text")
    if not isinstance(template, str):
        raise OrthoRankError(
            f"the installed lm-evaluation-harness has no template of LongBench's {name}; run: "
            f"{install('eval', '-U')}, or name a JSONL file with --data"
        )
    return lambda row: apply_template(template, row)


def task_of(name: str) -> Task:
    """The conventions of task ``name``.

    >>> task_of("samsum").first_line
    True
    """
    if name not in TASKS:
        raise OrthoRankError(f"task is {name!r}; LongBench's English and code tasks are {', '.join(TASKS)}")
    return TASKS[name]


def middle_cut(ids: list[int], longest: int) -> list[int]:
    """``ids`` if they are no more than ``longest``, else their first and last halves of that.

    >>> middle_cut([0, 1, 2, 3, 4, 5], 4)
    [0, 1, 4, 5]
    """
    if len(ids) <= longest:
        return ids
    half = longest // 2
    return ids[:half] + ids[len(ids) - half :]


def prompt_ids(question: Question, tokenizer: "PreTrainedTokenizerBase", longest: int, bos: str = "auto") -> list[int]:
    """The question in tokens: cut in its middle to ``longest``, then in the chat template where the task takes one.

    Args:
        bos: ``"auto"``: BOS where tokenizer and template put it; ``"first"`` and ``"every"``: before every prompt;
            ``"none"``: before none.
    """
    text = question.prompt
    ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    if len(ids) > longest:
        half = longest // 2
        kept = (ids[:half], ids[len(ids) - half :])
        text = "".join(tokenizer.decode(part, skip_special_tokens=True) for part in kept)
    if task_of(question.task).chat and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer(text, truncation=False, verbose=False)["input_ids"]
    return middle_cut(with_bos(list(ids), tokenizer, bos), longest)


def answer(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    question: Question,
    max_tokens: int | None = None,
    bos: str = "auto",
) -> str:
    """What ``model``, with whatever plan is applied to it, answers: greedy, until it ends or the task's length.

    Args:
        max_tokens: longest prompt with its answer; None: what the model was made for. bos: as for `prompt_ids`.
    """
    task = task_of(question.task)
    made_for = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    longest = min(max_tokens or made_for, made_for) - task.max_new_tokens
    if longest < 2:
        raise OrthoRankError(
            f"max_tokens is {max_tokens}, and answers of {question.task} take {task.max_new_tokens} tokens; nothing is "
            "left for a prompt"
        )
    ids = torch.tensor([prompt_ids(question, tokenizer, longest, bos)], device=device_of(model))
    settings: dict[str, Any] = {}
    if question.task == "samsum":  # a summary is one line: it ends at the first one, and is not empty
        settings = {"min_new_tokens": 1, "eos_token_id": [tokenizer.eos_token_id, tokenizer.encode("\n")[-1]]}
    generated = greedy(model, tokenizer, ids, task.max_new_tokens, **settings)
    return tokenizer.decode(generated, skip_special_tokens=True)


def metrics() -> Any:
    """The harness's module of LongBench's metric functions.

    Raises:
        OrthoRankError: it, or a library it needs, is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Using slow pure-python SequenceMatcher")  # of fuzzywuzzy, and meant so
            return importlib.import_module("lm_eval.tasks.longbench.metrics")
    except ImportError as error:
        raise OrthoRankError(
            "LongBench's metrics need lm-evaluation-harness with jieba, fuzzywuzzy and rouge "
            f"({str(error).splitlines()[0]}); run: {install('eval')}"
        ) from error


def score(question: Question, prediction: str) -> float:
    """LongBench's score of ``prediction``, 0 to 1: the best over the right answers."""
    task = task_of(question.task)
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    one: Callable[..., float] = getattr(metrics(), task.metric)
    return max(
        (float(one(prediction, right, all_classes=list(question.classes))) for right in question.answers), default=0.0
    )


def summary(scores: dict[str, list[float]]) -> dict[str, Any]:
    """Means in per cent, as LongBench states them: by task, by group of tasks (mean of its tasks), and over all tasks.

    >>> summary({"trec": [1.0, 0.0], "lcc": [0.9]})["groups"]
    {'few-shot': 50.0, 'code': 90.0}
    """
    by_task = {name: 100 * sum(values) / len(values) for name, values in scores.items() if values}
    groups: dict[str, list[float]] = {}
    for name, mean in by_task.items():
        groups.setdefault(task_of(name).group, []).append(mean)
    return {
        "tasks": by_task,
        "questions": {name: len(values) for name, values in scores.items()},
        "groups": {group: sum(means) / len(means) for group, means in groups.items()},
        "mean": sum(by_task.values()) / len(by_task) if by_task else None,
    }


def _parsed(path: str | Path, number: int, line: str) -> Question:
    where = f"line {number} of {str(path)!r}"
    try:
        row = from_json(line)
        name, prompt, index = row["task"], row["prompt"], int(row.get("idx", number))
        answers = row.get("gold", row.get("answers"))
        if isinstance(answers, dict):  # as some copies have it for tasks with labels
            row, answers = answers, answers["answers"]
        answers = (answers,) if isinstance(answers, str) else tuple(answers)
        classes = tuple(row.get("all_classes") or ())
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise OrthoRankError(
            f"{where} is no question ({type(error).__name__}: {error}); it must be a JSON object with task, prompt and "
            "gold (a list of right answers)"
        ) from error
    if name not in TASKS:
        raise OrthoRankError(f"{where} is of task {name!r}; LongBench's English and code tasks are {', '.join(TASKS)}")
    if not isinstance(prompt, str) or not prompt or not all(isinstance(a, str) for a in answers) or not answers:
        raise OrthoRankError(f"{where} needs a prompt and at least one right answer, as text")
    return Question(name, index, prompt, answers, classes)
