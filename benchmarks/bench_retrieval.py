"""What plans find again in long prompts, with and without maps; only what the dense model answers is counted.

Two kinds of prompts of about ``--tokens`` tokens. *Key-value*: JSON objects of one pair of words each, in blocks spread
over speeches, and for each pair a question that asks for the value, to be given exactly. A context is read once and its
questions go on from the cache, as a server with a prefix cache reads them: a question's tokens are a chunk of their
own, and select for themselves. *LongBench*: its prompts with their middle cut out and its scores, in per cent; a prompt
is answered where the dense model scores half or more.

The plans that come with the package, each as it is and with maps, fitted to windows of 256 tokens. Errors are
between contexts, and between prompts of LongBench. Each prompt is kept in ``--state``, so that a killed run goes on.

    python benchmarks/bench_retrieval.py --json benchmarks/results/retrieval_smollm2.json
    python benchmarks/bench_retrieval.py --quick
"""

import argparse
import copy
import hashlib
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.frontier.texts import read_texts
from benchmarks.retrieval.prompts import Context, make_context, paragraphs_of, to_fit
from orthorank import OrthoRankConfig, OrthoRankError, apply, context, fit_correction, handle_of
from orthorank.common.files import write_json
from orthorank.evaluation import plan_speedup
from orthorank.evaluation.answer_cache import owner_of
from orthorank.evaluation.answers import greedy
from orthorank.evaluation.kept import keep, kept_rows
from orthorank.evaluation.longbench import Question, local_questions, prompt_ids, score, task_of
from orthorank.models import load_model
from orthorank.plans import default_plan

DATA = Path(__file__).parents[2] / "shared" / "data"
PLANS = {
    "four layers at a third": ("orthorank", 0.1),
    "three layers removed": ("layer-pruning", 0.1),
    "nine layers at a third": ("orthorank", 0.2),
    "six layers removed": ("layer-pruning", 0.2),
}
TASKS = ("lcc", "repobench-p")  # of LongBench's tasks with short answers those of which the dense model answers any
ANSWERED = 0.5  # the score from which on a prompt of LongBench counts as answered
MARKS = ("`", "#", "//")  # lines of an answer with one of these are skipped by the score of these tasks


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="folder with wikitext2/, c4/, text/ and longcontext/")
    parser.add_argument("--tokens", type=int, default=2048, help="of a prompt (default: 2048)")
    parser.add_argument("--contexts", type=int, default=6, help="of the key-value pairs (default: 6)")
    parser.add_argument("--pairs", type=int, default=24, help="of a context (default: 24)")
    parser.add_argument("--longbench", type=int, default=12, help="prompts of each task that are tried (default: 12)")
    parser.add_argument("--rank", type=int, default=64, help="of the maps (default: 64)")
    parser.add_argument("--fit-windows", type=int, default=24, help="windows of 256 tokens to fit to (default: 24)")
    parser.add_argument("--state", type=Path, default=Path("retrieval-state"), help="folder for prompts and maps")
    parser.add_argument("--quick", action="store_true", help="one short context and two prompts: no figure to quote")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    if options.quick:
        options.tokens, options.contexts, options.longbench, options.fit_windows = 512, 1, 1, 4
    return options


@torch.inference_mode()
def ask(model: Any, given: Context, which: list[bool]) -> list[bool]:
    """Which questions the model, with whatever plan is applied to it, answers: greedily, with just the right tokens.

    Text and question are prompt, the answer is generated: its right tokens are given one by one, and an answer is right
    where each of them is the likeliest. Questions that ``which`` leaves out are not asked, and count as not answered.
    """
    from transformers import DynamicCache

    found, cache = [False] * len(which), DynamicCache(config=model.config)
    # the name since transformers 5.24, and before
    name = "cache" if "cache" in signature(type(model).forward).parameters else "past_key_values"
    model(input_ids=torch.tensor([given.ids]), use_cache=True, logits_to_keep=1, **{name: cache})
    for number, (question, answer) in enumerate(given.questions):
        if not which[number]:
            continue
        ids = torch.tensor([question + answer[:-1]])
        prompt = len(given.ids) + len(question)
        with nullcontext() if handle_of(model) is None else context(model, prompt):
            out = model(input_ids=ids, logits_to_keep=len(answer), **{name: copy.deepcopy(cache)})
        found[number] = out.logits[0].argmax(-1).tolist() == answer
    return found


def complete(model: Any, tokenizer: Any, question: Question, tokens: int) -> float:
    """LongBench's score of the model's greedy answer, which ends at the line that is scored."""
    task = task_of(question.task)
    ids = torch.tensor([prompt_ids(question, tokenizer, tokens - task.max_new_tokens)])

    def ended(so_far: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return torch.tensor([has_scored_line(tokenizer.decode(so_far[0, ids.shape[1] :]))])

    answer = greedy(model, tokenizer, ids, task.max_new_tokens, stopping_criteria=[ended])
    return score(question, tokenizer.decode(answer, skip_special_tokens=True))


def has_scored_line(answer: str) -> bool:
    """Whether the line that the score of the tasks reads has ended: the first that is neither empty nor a comment."""
    return any(line.strip() and not any(mark in line for mark in MARKS) for line in answer.split("\n")[:-1])


class Kept:
    """What is measured, by prompt and by who answers it; each row is written as soon as it is there."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "prompts.jsonl"
        self.rows = kept_rows(self.file, value=list, seconds=float)
        self.used: set[str] = set()

    def get(self, measure: Callable[[], list[Any]], *of: Any) -> list[Any]:
        """The row of ``of``, measured if it is not there."""
        key = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:24]
        if key not in self.rows:
            began = time.process_time()
            value = measure()
            self.rows[key] = {"key": key, "value": value, "seconds": time.process_time() - began}
            keep(self.file, self.rows[key])
        self.used.add(key)
        return list(self.rows[key]["value"])

    def minutes(self) -> float:
        """Processor time of all rows that were asked for."""
        return sum(self.rows[key]["seconds"] for key in self.used) / 60


def variants(
    model: Any, fit_ids: torch.Tensor, rank: int, tokens: int, kept: Kept
) -> Iterator[tuple[str, float, OrthoRankConfig]]:
    """Each plan as it is and corrected: name, FLOPs of a prompt against the dense model's, and the plan."""
    for title, (kind, sparsity) in PLANS.items():
        plain = default_plan(model, kind, sparsity)
        folder = kept.folder / f"{title.replace(' ', '-')}-{rank}-{fit_ids.numel()}"

        def fit(plain: OrthoRankConfig = plain, folder: Path = folder) -> list[Any]:
            fit_correction(model, fit_ids, plain, rank=rank).save_pretrained(folder)
            return []

        kept.get(fit, "fit", owner_of(model, plain, False, {}), fit_ids.tolist(), rank, str(folder))
        for name, plan in ((title, plain), (f"{title}, corrected", OrthoRankConfig.from_pretrained(folder))):
            yield name, 1 / plan_speedup(model.config, tokens, plan), plan


def mean_of_groups(groups: list[list[float]]) -> tuple[float, float]:
    """Mean of all values, and its standard error where values of one group may belong together: NaN for one group.

    >>> mean_of_groups([[1.0], [0.0]]), mean_of_groups([[1.0, 0.0], [1.0, 0.0], []])
    ((0.5, 0.5), (0.5, 0.0))
    """
    groups = [group for group in groups if group]
    if not groups:
        return math.nan, math.nan
    mean = statistics.fmean(value for group in groups for value in group)
    apart = sum(sum(value - mean for value in group) ** 2 for group in groups)
    count, values = len(groups), sum(map(len, groups))
    return mean, math.sqrt(apart * count / (count - 1)) / values if count > 1 else math.nan


def table_of(found: dict[str, list[list[float]]], flops: dict[str, float], least: float) -> dict[str, Any]:
    """Scores on what the dense model answers, in per cent; a corrected plan's against the same plan's as it is.

    Args:
        found: of the dense model, first, and of each plan: its scores, 0 to 1, by group.
        least: the dense model's score from which on something counts as answered.
    """
    dense = found["dense"]
    tried = [value for group in dense for value in group]
    rows = []
    for name, groups in found.items():
        pairs = [list(zip(mine, theirs, strict=True)) for mine, theirs in zip(groups, dense, strict=True)]
        mean, error = mean_of_groups([[100 * a for a, b in group if b >= least] for group in pairs])
        row: dict[str, Any] = {"name": name, "flops": flops[name], "score": mean, "standard_error": error}
        if (plain := found.get(name.removesuffix(", corrected"))) is not None and name.endswith(", corrected"):
            triples = [list(zip(*three, strict=True)) for three in zip(groups, plain, dense, strict=True)]
            apart = mean_of_groups([[100 * (a - b) for a, b, c in group if c >= least] for group in triples])
            row["against_plain"] = {"difference": apart[0], "standard_error": apart[1]}
        rows.append(row)
    answered = [sum(value >= least for value in group) for group in dense]
    return {
        "tried": len(tried),
        "dense_score": 100 * statistics.fmean(tried),
        "answered": sum(answered),
        "groups": sum(count > 0 for count in answered),
        "rows": rows,
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    model, tokenizer, info = load_model(device="cpu", dtype="float32")
    kept = Kept(options.state)
    paragraphs = paragraphs_of(read_texts(options.data)[1]["speeches"])
    contexts = [
        make_context(tokenizer, paragraphs, options.tokens, options.pairs, seed) for seed in range(options.contexts)
    ]
    every = local_questions(options.data / "longcontext" / "minilongbench_en.jsonl")
    asked = [each for task in TASKS for each in [q for q in every if q.task == task][: options.longbench]]
    fit_ids = to_fit(tokenizer, options.data, options.fit_windows, 256)
    found: dict[str, dict[str, list[list[float]]]] = {"key-value": {}, "LongBench": {}}
    flops = {"dense": 1.0}

    def answers(name: str, plan: OrthoRankConfig | None) -> None:
        who = owner_of(model, plan, False, {})
        with nullcontext() if plan is None else apply(model, plan):
            wanted = found["key-value"].get("dense") or [[True] * options.pairs] * len(contexts)
            found["key-value"][name] = [
                kept.get(lambda c=c, which=which: ask(model, c, which), who, c)
                for c, which in zip(contexts, wanted, strict=True)
            ]
            dense = found["LongBench"].get("dense")
            found["LongBench"][name] = [
                kept.get(lambda q=q: [complete(model, tokenizer, q, options.tokens)], who, q.prompt, options.tokens)
                if dense is None or dense[number][0] >= ANSWERED
                else [0.0]
                for number, q in enumerate(asked)
            ]
        shown = {kind: table_of(each, flops, ANSWERED) for kind, each in found.items()}
        said = [f"{kind} {each['rows'][-1]['score']:.1f} (n = {each['answered']})" for kind, each in shown.items()]
        print(f"{name:38} {'  '.join(said)}  {kept.minutes():.0f} min of CPU", flush=True)

    answers("dense", None)
    for name, share, plan in variants(model, fit_ids, options.rank, options.tokens, kept):
        flops[name] = share
        answers(name, plan)
    tables = {kind: table_of(each, flops, ANSWERED) for kind, each in found.items()}
    for kind, each in tables.items():
        print(f"{kind}: {each['tried']} tried, the dense model scores {each['dense_score']:.1f} on them", end="")
        print(f" and answers {each['answered']}")
    return {
        "model": info.name,
        "dtype": "float32",
        "tokens": options.tokens,
        "pairs": options.pairs,
        "rank": options.rank,
        "fit_tokens": fit_ids.numel(),
        "longbench_tasks": list(TASKS),
        "processor_minutes": round(kept.minutes(), 1),
        "prompts": tables,
    }


def main() -> int:
    options = arguments()
    try:
        found = measure(options)
        if options.json is not None:
            write_json(options.json, found)
            print(f"wrote {options.json}")
    except OrthoRankError as error:
        print(f"bench_retrieval: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
