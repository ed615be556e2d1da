"""The end of a budget search: the plan, the front as files and picture, and what is left of it on held-out text."""

import time
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from contrib.budget.pareto import Point, front_as_csv, front_as_dict
from contrib.budget.pareto_plot import can_draw, draw_front
from contrib.budget.plans import key_of, plan_of
from contrib.budget.state import BudgetState
from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import write_json, write_text
from orthorank.config import OrthoRankConfig
from orthorank.search.run import with_maps
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from contrib.budget.search import Search


def finish(search: "Search", state: BudgetState) -> dict[str, Any]:
    """Write the plan and the front at once, then measure, and write the plan again with its figures.

    Raises:
        OrthoRankError: Ctrl-C while measuring; the files are there.
    """
    job = search.job
    if not job.first:
        return job.group.share({})
    write_front(search, state, complete=True)
    found = config_of(search, state, complete=True)
    assert found is not None
    try:
        plan = with_maps(job, found)
        with job.screen.progress("measuring the plans", 1):
            rows = _rows(search, state, plan)
    except KeyboardInterrupt:
        raise OrthoRankError(f"interrupted while the plans were measured; the plan is in {job.folder.plan}") from None
    dense, mixed = rows[0], rows[-1]
    plan.measured = {
        "perplexity": mixed["perplexity"],
        "dense_perplexity": dense["perplexity"],
        "text": job.calibration.held_out_words,
        "flop_speedup": round(mixed["flop_speedup"], 4),
        "flop_speedup_tokens": search.space.costs.tokens,
    }
    plan.save_pretrained(job.folder.path)
    results = {
        "rows": rows,
        "plan": plan.to_dict(),
        "plan_file": str(job.folder.plan),
        "evaluations": state.evaluations,
        "seconds": round(time.perf_counter() - job.began, 1),
    }
    job.folder.write(job.identity, results)
    return job.group.share(results)


def write_front(search: "Search", state: BudgetState, *, complete: bool) -> str:
    """Write plan, ``pareto.json``, ``pareto.csv`` and, with matplotlib, the pictures; what there is, in words."""
    job, space = search.job, search.space
    plan, points = config_of(search, state, complete=complete), state.points(space)
    facts = {
        "version": __version__,
        "model": job.info.name,
        "budget": search.budget,
        "unit": space.costs.unit,
        "prompt_tokens": space.costs.tokens,
        "complete": complete,
        "evaluations": state.evaluations,
        "calibration": job.calibration.to_dict(),
    }
    write_json(job.folder.path / "pareto.json", front_as_dict(points, space.costs.dense, facts))
    write_text(job.folder.path / "pareto.csv", front_as_csv(points, space.costs.dense))
    if can_draw() and points:
        draw_front(
            points,
            space.costs.dense,
            job.folder.path,
            title=f"{job.info.name}: plans by cost",
            unit=space.costs.unit,
            budget=search.budget,
            chosen=search.best(state),
        )
    if plan is None:
        return f" (no plan within the budget yet; the front so far is in {job.folder.path})"
    plan.save_pretrained(job.folder.path)
    return f" (the best plan so far is in {job.folder.plan})"


def config_of(search: "Search", state: BudgetState, *, complete: bool) -> OrthoRankConfig | None:
    """The best plan within the budget as a plan file; None: none was measured."""
    point, job = search.best(state), search.job
    if point is None:
        return None
    ratios = Counter(ratio for ratio in point.plan.values() if ratio > 0) or Counter(point.plan.values())
    common = ratios.most_common(1)[0][0] if ratios else job.settings.keep_ratio
    return OrthoRankConfig.for_model(
        job.model,
        layers=list(point.plan),
        keep_ratio=common,
        keep_ratios={layer: ratio for layer, ratio in point.plan.items() if ratio != common},
        criterion=job.settings.criterion,
        sink_layer=job.sink_layer,
        calibration=job.calibration.to_dict()
        | {"bos": job.calibration.bos.policy}
        | {
            "method": job.settings.title,
            "keep_ratios": sorted({ratio for own in search.space.ratios.values() for ratio in own}),
            "cost": point.cost / search.space.costs.dense,
            "cost_unit": search.space.costs.unit,
            "prompt_tokens": search.space.costs.tokens,
            "starts": list(search.starts),
            "loss": point.loss,
            "complete": complete,
            "evaluations": state.evaluations,
            "batch_size": job.evaluator.batch_size,
            "dtype": job.info.dtype,
        },
    )


def _rows(search: "Search", state: BudgetState, mixed: OrthoRankConfig) -> list[dict[str, Any]]:
    points = {key_of(point.plan): point for point in state.points(search.space)}
    rows = [_row(search, "dense", points[()], None)]
    for name, plan in search.starts.items():
        if (point := points.get(key_of(plan_of(plan)))) is not None:
            rows.append(_row(search, name, point, with_maps(search.job, plan)))
    chosen = search.best(state)
    assert chosen is not None
    return [*rows, _row(search, "mixed", chosen, mixed)]


def _row(search: "Search", name: str, point: Point, plan: OrthoRankConfig | None) -> dict[str, Any]:
    from orthorank.evaluation import plan_speedup

    job, costs = search.job, search.space.costs
    speedup = 1.0
    if plan is not None:
        speedup = plan_speedup(job.model.config, costs.tokens, plan)
    return {
        "name": name,
        "layers": list(point.plan),
        "keep_ratios": {str(layer): ratio for layer, ratio in point.plan.items()},
        "changes": in_words(point),
        "cost": point.cost / costs.dense,
        "loss": point.loss,
        "perplexity": _held_out(search, plan),
        "flop_speedup": speedup,
    }


def _held_out(search: "Search", plan: OrthoRankConfig | None) -> float | None:
    """Perplexity on windows that the search has not seen, by the patched model itself; None: there is no text left."""
    from orthorank.evaluation import perplexity
    from orthorank.hf.apply import apply

    job = search.job
    if job.calibration.held_out is None:
        return None
    with nullcontext() if plan is None else apply(job.model, plan):
        return perplexity(job.model, job.calibration.held_out).perplexity


def in_words(point: Point) -> str:
    """The layers of a plan by keep ratio.

    >>> in_words(Point(1.0, 2.0, {12: 0.5, 13: 0.5, 14: 0.5, 20: 0.0}))
    '12-14 at 0.5; 20 removed'
    """
    parts = []
    for ratio in sorted(set(point.plan.values()), reverse=True):
        layers = words.layers([layer for layer, own in point.plan.items() if own == ratio])
        parts.append(f"{layers} removed" if ratio == 0 else f"{layers} at {words.ratio(ratio)}")
    return "; ".join(parts) or "none"
