"""Answering LongBench's questions: one after the other, each answer kept at once, so that a run can be continued."""

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.evaluation.kept import keep, kept_rows
from orthorank.evaluation.longbench import Question, answer, score, summary

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OnAnswer = Callable[[int, int, Question, float], None]


def run_longbench(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    questions: Iterable[Question],
    *,
    max_tokens: int | None = None,
    bos: str = "auto",
    answers: Path | None = None,
    identity: str = "",
    before: str | None = None,
    on_answer: OnAnswer | None = None,
) -> dict[str, Any]:
    """Scores of ``model``, with whatever plan is applied to it, on ``questions``.

    Args:
        max_tokens: longest prompt with its answer; longer prompts lose their middle. None: what the model takes.
        answers: a JSONL file that gets each answer as soon as it is there. Answers that it holds already are not
            computed again, if they are of the same question, ``max_tokens`` and ``identity``.
        identity: what else the answers depend on: the model and the plan. before: what an earlier version called it,
            whose answers are taken, too. bos: as for `orthorank.evaluation.longbench.prompt_ids`.
        on_answer: called after each question as ``on_answer(done, total, question, score)``.

    Returns:
        `orthorank.evaluation.longbench.summary` of the scores: means by task, by group and over all, in per cent.

    Raises:
        OrthoRankError: no questions, or the file of answers is of another run.
    """
    asked = list(questions)
    if not asked:
        raise OrthoRankError("questions is empty; there is nothing to answer")
    rows = {} if answers is None else kept_rows(answers, answer=str)
    scores: dict[str, list[float]] = {}
    for number, question in enumerate(asked, 1):
        key, *others = (
            _key(question, max_tokens, each if bos == "auto" else f"{each} bos {bos}")
            for each in (identity, before)
            if each is not None
        )
        if (found := next((each for each in (key, *others) if each in rows), None)) is not None:
            text = rows[found]["answer"]
        else:
            text = answer(model, tokenizer, question, max_tokens, bos)
            if answers is not None:
                keep(answers, {"key": key, "task": question.task, "index": question.index, "answer": text})
        value = score(question, text)
        scores.setdefault(question.task, []).append(value)
        if on_answer is not None:
            on_answer(number, len(asked), question, value)
    return summary(scores)


def _key(question: Question, max_tokens: int | None, identity: str) -> str:
    parts = json.dumps([question.task, question.prompt, max_tokens, identity])
    return hashlib.sha256(parts.encode()).hexdigest()[:24]
