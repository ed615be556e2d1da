"""Running the harness on a model with a plan, and the paper's mean over tasks."""

import copy
import hashlib
import logging
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, reason_of
from orthorank.common.loading import silent
from orthorank.common.paired import paired
from orthorank.common.texts import adds_bos, check_bos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from orthorank.config import OrthoRankConfig

TASK_FILES = (".yaml", ".yml", ".py", ".json", ".jsonl", ".csv", ".parquet")
METRICS = ("acc_norm", "acc")  # the paper's choice: acc_norm where a task has it


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    plan: "OrthoRankConfig | str | Path | None" = None,
    include_path: str | Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    context_only: bool = False,
    bos: str = "auto",
    samples: bool = False,
) -> dict[str, Any]:
    """Accuracy of ``model`` on tasks of lm-evaluation-harness, without examples in the prompt (paper, section 4.1).

    Args:
        model: a causal model without a plan applied; left as it was. tokenizer: the model's.
        tasks: names that the harness knows, or that are defined by files in the folder ``include_path``.
        plan: applied for the time of the evaluation; None: the dense model.
        limit: first rows of each task; None: all.
        batch_size: requests that run together; the results do not depend on it but for rounding.
        context_only: select among the context alone; see `orthorank.evaluation.tasks.OrthoRankLM`.
        bos: whether a request begins with the tokenizer's BOS: ``"auto"`` where the tokenizer adds one by itself,
            ``"first"`` and ``"every"`` the same, or an error where it adds none; ``"none"``.
        samples: whether a row has ``scores`` as well: the metric of each row of the task, in the data's order.

    Returns:
        ``tasks`` (a row for each: metric, value and standard error, 0 to 1), ``mean``, the plan, and
        ``last_token_selected``: how often a layer of the plan updated the last token of a request, 0 to 1; ``bos``:
        whether requests begin with it.

    Raises:
        OrthoRankError: no tasks, one that the harness does not know, data that cannot be loaded, a task without an
            accuracy, or a layer of the plan that was never active.
    """
    if not tasks:
        raise OrthoRankError("tasks is empty; name at least one, such as piqa")
    from orthorank.evaluation.tasks import OrthoRankLM  # first: it says what to do where the harness is missing

    import lm_eval  # isort: skip
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise OrthoRankError(
            f"tasks holds {unknown[0]!r}, which the harness does not know; `orthorank lm-eval ls tasks` lists "
            "what there is, and --include-path names a folder with task files of your own"
        )
    check_bos(bos)
    adds = adds_bos(tokenizer)
    if bos in ("first", "every") and not adds:
        raise OrthoRankError(
            f"bos is {bos!r} and the tokenizer adds no BOS to a request; it may be auto or none, or let the tokenizer "
            "add one (add_bos_token in its tokenizer_config.json)"
        )
    own = copy.deepcopy(tokenizer)  # the harness gives it a padding token
    # It warns of a model that is loaded already, as is meant here.
    with silent("lm_eval.models.huggingface", level=logging.ERROR):
        adapter = OrthoRankLM(
            model,
            plan=plan,
            context_only=context_only,
            tokenizer=own,
            batch_size=batch_size,
            add_bos_token=False if bos == "none" else None,
        )
    try:
        found = lm_eval.simple_evaluate(
            model=adapter, tasks=list(tasks), task_manager=manager, num_fewshot=0, limit=limit, log_samples=samples
        )
    except (OSError, ConnectionError, ValueError) as error:
        raise OrthoRankError(f"the tasks cannot be evaluated: {reason_of(error)}") from error
    finally:
        if adapter.handle is not None:
            adapter.handle.remove()
    mean, metrics = paper_mean(found["results"], tasks)
    rows = [_row(task, metrics[task], found) for task in tasks]
    return {
        "tasks": rows,
        "mean": mean,
        "plan": None if adapter.handle is None else adapter.handle.config.to_dict(),
        "context_only": adapter.context_only,
        "last_token_selected": adapter.last_tokens.share,
        "bos": adds and bos != "none",
        "harness": lm_eval.__version__,
    }


def definition_of(tasks: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """What decides what ``tasks`` are: their names, the harness, and the files of ``include_path`` with what they hold.

    Data in files elsewhere, which a task file names, are not looked at.
    """
    from importlib import metadata

    found = {"tasks": list(tasks), "harness": metadata.version("lm_eval")}
    if include_path is None:
        return found
    digest = hashlib.sha256()
    for file in sorted(path for path in include_path.rglob("*") if path.suffix in TASK_FILES and path.is_file()):
        digest.update(f"{file.relative_to(include_path)}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return found | {"task_files": digest.hexdigest()[:16]}


def _row(task: str, metric: str, found: dict[str, Any]) -> dict[str, Any]:
    by_name = {name.partition(",")[0]: value for name, value in found["results"][task].items()}
    error = by_name.get(f"{metric}_stderr")
    return {
        "task": task,
        "rows": found["n-samples"][task]["effective"],
        "metric": metric,
        "value": by_name[metric],
        "standard_error": error if isinstance(error, float) else None,
    } | ({"scores": _scores(found["samples"].get(task, []), metric)} if "samples" in found else {})


def _scores(samples: list[dict[str, Any]], metric: str) -> list[float]:
    """The metric of each row of a task; of several filters the first one's."""
    by_row: dict[int, float] = {}
    for sample in samples:
        by_row.setdefault(sample["doc_id"], float(sample[metric]))
    return [by_row[row] for row in sorted(by_row)]


def task_differences(first: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How much ``other`` is better than ``first``, row by row of each task.

    Args:
        first, other: results of `evaluate_tasks` with ``samples``, of the same tasks and rows.

    Returns:
        ``tasks``: for each, ``mean`` of the differences of its rows' scores and ``standard_error``, both None where
        the harness has no score for each row; ``mean`` over tasks and its ``standard_error``.

    Example:
        >>> row = {"task": "piqa", "metric": "acc"}
        >>> dense, plan = ({"tasks": [row | {"scores": scores}]} for scores in ([1, 1, 0, 1], [1, 0, 0, 0]))
        >>> task_differences(dense, plan)["tasks"]
        [{'task': 'piqa', 'mean': -0.5, 'standard_error': 0.288675134595}]
    """
    found = []
    for a, b in zip(first["tasks"], other["tasks"], strict=True):
        known = a["task"] == b["task"] and a["metric"] == b["metric"] and len(a["scores"]) == len(b["scores"]) > 0
        mean, error = paired(a["scores"], b["scores"]) if known else (None, None)
        found.append({"task": a["task"], "mean": mean, "standard_error": error})
    if any(each["mean"] is None for each in found):
        return {"tasks": found, "mean": None, "standard_error": None}
    mean = statistics.fmean(each["mean"] for each in found)
    error = math.hypot(*(each["standard_error"] for each in found)) / len(found)
    return {"tasks": found, "mean": mean, "standard_error": error}


def paper_mean(results: dict[str, dict[str, Any]], tasks: Iterable[str] | None = None) -> tuple[float, dict[str, str]]:
    """The paper's mean accuracy over tasks, 0 to 1, and which metric each task went in with.

    Args:
        results: ``"results"`` of the harness: by task, ``{"acc,none": ..., "acc_norm,none": ...}``.
        tasks: which ones; None: all.

    Raises:
        OrthoRankError: a task has no accuracy.

    Example:
        >>> results = {"piqa": {"acc,none": 0.6, "acc_norm,none": 0.8}, "winogrande": {"acc,none": 0.5}}
        >>> mean, metrics = paper_mean(results)
        >>> round(mean, 2), metrics
        (0.65, {'piqa': 'acc_norm', 'winogrande': 'acc'})
    """
    metrics: dict[str, str] = {}
    values = []
    for task in results if tasks is None else tasks:
        by_name = {name.partition(",")[0]: value for name, value in results[task].items()}
        metric = next((name for name in METRICS if isinstance(by_name.get(name), (float, int))), None)
        if metric is None:
            raise OrthoRankError(f"task {task!r} has no acc_norm and no acc; the paper's mean is over accuracies")
        metrics[task] = metric
        values.append(float(by_name[metric]))
    if not values:
        raise OrthoRankError("no task was evaluated, so there is no mean")
    return sum(values) / len(values), metrics
