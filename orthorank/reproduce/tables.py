"""The paper's tables, as rows of cells: each function measures what is missing and returns JSON."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.evaluation.longbench import TASKS, hub_questions, local_questions
from orthorank.evaluation.longbench_run import run_longbench
from orthorank.evaluation.task_scores import evaluate_tasks
from orthorank.hf.apply import apply
from orthorank.reproduce import paper
from orthorank.reproduce.subject import KEEP_RATIO, Subject, digest, measured_of, plan_key
from orthorank.speed.bench import random_prompt
from orthorank.speed.bench_results import flop_speedup_of
from orthorank.speed.timing import time_prefill

# Table 1's rows: name, search, keep ratio, nominal sparsity.
MAIN_ROWS: tuple[tuple[str, str, float, float], ...] = (
    ("sleb-10", "greedy", 0.0, 0.1),
    ("sleb-10+orthorank", "greedy", KEEP_RATIO, 0.1),
    ("sleb-20", "greedy", 0.0, 0.2),
    ("sleb-20+orthorank", "greedy", KEEP_RATIO, 0.2),
    ("shortened-10", "one-shot", 0.0, 0.1),
    ("shortened-10+orthorank", "one-shot", KEEP_RATIO, 0.1),
    ("shortened-20", "one-shot", 0.0, 0.2),
    ("shortened-20+orthorank", "one-shot", KEEP_RATIO, 0.2),
)
ABLATIONS: dict[str, dict[str, Any]] = {
    "random": {"criterion": "random"},
    "inverse": {"criterion": "inverse"},
    "prenorm": {"criterion": "prenorm"},
    "selected-kv": {"kv": "selected"},
    "full": {},
}
RANK = 64  # of the maps of corrected rows
LAYERS_AND_RATIOS = (("0.2 x 0", 0.0), ("0.3 x 1/3", KEEP_RATIO), ("0.4 x 1/2", 0.5))


def main_plans(subject: Subject) -> dict[str, OrthoRankConfig | None]:
    """The plans of Table 1 by row; rows that this model has too few layers for are left out."""
    plans: dict[str, OrthoRankConfig | None] = {"dense": None}
    for name, method, keep_ratio, sparsity in MAIN_ROWS:
        if subject.reaches(method, keep_ratio, sparsity):
            plans[name] = subject.plan(method, keep_ratio, sparsity)
    return plans


def table1(subject: Subject) -> dict[str, Any]:
    """Perplexity on every held-out text, and throughput, of SLEB and Shortened LLaMA without and with OrthoRank."""
    plans = main_plans(subject)
    speeds = throughput(subject, plans)
    rows = [
        {
            "row": name,
            **_measured(subject, plan),
            "throughput": speeds[name],
            "paper_perplexity": dict(zip(paper.MODELS, paper.PERPLEXITY.get(name, ()), strict=False)),
            "paper_throughput": paper.THROUGHPUT.get(name),
        }
        for name, plan in plans.items()
    ]
    return {"rows": rows}


def table2(subject: Subject) -> dict[str, Any]:
    """Zero-shot accuracy of the same rows."""
    rows = []
    for name, plan in main_plans(subject).items():
        found = zero_shot(subject, plan)
        known = dict(zip(paper.MODELS, paper.ACCURACY.get(name, ()), strict=False))
        rows.append({"row": name, "accuracy": found, "paper_accuracy": known})
    return {"rows": rows}


def table3(subject: Subject) -> dict[str, Any]:
    """Every ablation at 20 %, then the settings' own criteria: the layers of SLEB + OrthoRank, tokens selected in
    other ways."""
    rows: list[dict[str, Any]] = []
    asked = ABLATIONS | {name: {"criterion": name} for name in subject.settings.criteria}
    for name, fields in asked.items() if subject.reaches("greedy", KEEP_RATIO, 0.2) else ():
        plan = subject.plan("greedy", KEEP_RATIO, 0.2, **fields)
        known, accuracies = paper.ABLATION.get(name, ((), ()))
        rows.append(
            {
                "row": name,
                **_measured(subject, plan),
                "accuracy": zero_shot(subject, plan),
                "paper_perplexity": dict(zip(paper.ABLATION_MODELS, known, strict=False)),
                "paper_accuracy": dict(zip(paper.ABLATION_MODELS, accuracies, strict=False)),
            }
        )
    return {"rows": rows}


def table4(subject: Subject) -> dict[str, Any]:
    """Few layers with no tokens, or more layers with more tokens, at 20 %."""
    rows = []
    for name, keep_ratio in LAYERS_AND_RATIOS:
        row: dict[str, Any] = {"row": name, "paper_accuracy": {"Llama-2-13B": paper.LAYER_AND_KEEP_RATIO[name]}}
        if subject.reaches("greedy", keep_ratio, 0.2):
            plan = subject.plan("greedy", keep_ratio, 0.2)
            row |= _measured(subject, plan) | {"accuracy": zero_shot(subject, plan)}
        rows.append(row)
    return {"rows": rows}


def sweep(subject: Subject) -> dict[str, Any]:
    """Perplexity over nominal sparsity, of layer pruning and OrthoRank; the plans are prefixes of one greedy run."""
    points = []
    for name, keep_ratio in (("sleb", 0.0), ("orthorank", KEEP_RATIO)):
        for sparsity in subject.settings.sweep:
            if not subject.reaches("greedy", keep_ratio, sparsity):
                continue  # the model has too few layers behind the sink
            plan = subject.plan("greedy", keep_ratio, sparsity)
            points.append(
                {
                    "method": name,
                    "sparsity": sparsity,
                    "layers": plan.layers,
                    "nominal_sparsity": left_out(subject, plan),
                    "flop_speedup": _flops(subject, plan),
                    "perplexity": _perplexities(subject, plan),
                }
            )
    return {"points": points}


def corrected(subject: Subject) -> dict[str, Any]:
    """SLEB's rows with maps fitted to the windows of the searches, beside the same without; beyond the paper."""
    rank = min(RANK, subject.model.config.get_text_config().hidden_size)
    rows = [
        {
            "row": name,
            "plan": plan_key(plan),
            "rank": rank,
            "nominal_sparsity": left_out(subject, plan),
            "flop_speedup": _flops(subject, plan, rank),
            "perplexity": _perplexities(subject, plan, rank),
            "plain_perplexity": _perplexities(subject, plan),
            "accuracy": zero_shot(subject, plan, rank),
        }
        for name, plan in main_plans(subject).items()
        if plan is not None and name.startswith("sleb")
    ]
    return {"rows": rows}


def longbench(subject: Subject) -> dict[str, Any]:
    """LongBench of the dense model, of layer pruning and of OrthoRank at 20 %."""
    source = subject.settings.longbench
    if source is None:
        raise OrthoRankError("longbench is None; name a JSONL file of questions, or hub")
    questions = list(hub_questions(list(TASKS))) if source == "hub" else local_questions(source)
    longest = subject.settings.longbench_tokens
    if longest is not None:
        questions = [q for q in questions if len(subject.tokenizer(q.prompt, verbose=False)["input_ids"]) <= longest]
    rows = [
        {"row": name, "plan": plan_key(plan), "scores": _answered(subject, plan, questions)}
        for name, plan in main_plans(subject).items()
        if questions and name in ("dense", "sleb-20", "sleb-20+orthorank")
    ]
    name = source if source == "hub" else Path(source).name
    return {"data": name, "questions": len(questions), "longest_prompt": longest, "rows": rows}


def _measured(subject: Subject, plan: OrthoRankConfig | None) -> dict[str, Any]:
    """What the rows of Tables 1, 3 and 4 have in common."""
    return {
        "plan": plan_key(plan),
        "nominal_sparsity": left_out(subject, plan),
        "perplexity": _perplexities(subject, plan),
    }


def _perplexities(subject: Subject, plan: OrthoRankConfig | None, rank: int = 0) -> dict[str, Any]:
    """On every held-out text."""
    return {text: subject.perplexity(plan, text, rank) for text in subject.windows}


def left_out(subject: Subject, plan: OrthoRankConfig | None) -> float:
    """Share of token updates that a plan leaves out: layers are whole, so not quite the sparsity asked for."""
    return 0.0 if plan is None else plan.nominal_sparsity(subject.num_layers)


def throughput(subject: Subject, plans: dict[str, OrthoRankConfig | None]) -> dict[str, Any]:
    """Prefill tokens per second of every plan, interleaved in one run, and the speed-up that FLOPs alone would give."""
    settings = subject.settings
    inputs: dict[str, Any] = {name: measured_of(plan) for name, plan in plans.items()}
    inputs |= {"prompt_tokens": settings.prompt_tokens, "rounds": settings.rounds}

    def measure() -> dict[str, Any]:
        prompt = random_prompt(subject.model, 1, settings.prompt_tokens)
        with subject.screen.progress("throughput", settings.rounds) as advance:
            report = time_prefill(
                subject.model, plans, prompt, rounds=settings.rounds, on_round=lambda done, total: advance(done, "")
            )
        common = {"clock": report.clock, "device": report.device, "threads": report.threads, "prompt": report.prompt}
        return {name: timing.to_dict() | common for name, timing in report.timings.items()}

    found = subject.cells.get("throughput", inputs, measure)
    return {name: found[name] | {"flop_speedup": _flops(subject, plan)} for name, plan in plans.items()}


def zero_shot(subject: Subject, plan: OrthoRankConfig | None, rank: int = 0) -> dict[str, Any] | None:
    """Accuracy on the settings' tasks, with maps of ``rank``; None when there are no tasks."""
    settings = subject.settings
    if not settings.tasks:
        return None
    inputs = {"plan": measured_of(plan), "tasks": list(settings.tasks), "limit": settings.task_limit}
    inputs |= subject.fitted(rank)

    def measure() -> dict[str, Any]:
        with subject.screen.progress(f"zero-shot: {', '.join(settings.tasks)}", 1):
            return evaluate_tasks(
                subject.model,
                subject.tokenizer,
                settings.tasks,
                plan=subject.corrected(plan, rank),
                include_path=settings.include_path,
                limit=settings.task_limit,
            )

    return subject.cells.get(f"zero-shot/{digest(inputs)}", inputs, measure)


def _answered(subject: Subject, plan: OrthoRankConfig | None, questions: list[Any]) -> dict[str, Any]:
    inputs = {"plan": measured_of(plan), "questions": digest([[q.task, q.prompt] for q in questions])}
    folder = subject.cells.folder / "longbench"

    def measure() -> dict[str, Any]:
        folder.mkdir(parents=True, exist_ok=True)
        with (
            nullcontext() if plan is None else apply(subject.model, plan),
            subject.screen.progress("LongBench", len(questions)) as advance,
        ):
            return run_longbench(
                subject.model,
                subject.tokenizer,
                questions,
                answers=folder / f"answers-{digest(inputs)}.jsonl",
                identity=subject.cells.key(inputs),
                on_answer=lambda done, total, question, score: advance(done, f"{question.task}: {100 * score:.0f}"),
            )

    return subject.cells.get(f"longbench/{digest(inputs)}", inputs, measure)


def _flops(subject: Subject, plan: OrthoRankConfig | None, rank: int = 0) -> float | None:
    ranks = None if plan is None else dict.fromkeys(plan.layers, rank)
    return flop_speedup_of(subject.model.config, plan, subject.settings.prompt_tokens, ranks)
