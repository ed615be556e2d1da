"""The end of a search: the losses of the dense model and of the plan, held-out perplexity, and the files."""

import time
from contextlib import nullcontext
from typing import Any

from orthorank.config import OrthoRankConfig
from orthorank.errors import OrthoRankError
from orthorank.evaluation import flop_speedup
from orthorank.search.job import Job, Outcome, plan_of
from orthorank.search.methods import evaluator_of

FLOP_TOKENS = 2048  # prompt for which the FLOP-ideal speed-up is stated


def finish(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Write the plan at once, then measure it and write it again with the figures.

    Raises:
        OrthoRankError: Ctrl-C while measuring; the plan is there.
    """
    plan_of(job, outcome).save_pretrained(job.folder.path)
    try:
        with job.screen.progress("measuring the plan", 1):
            losses = _calibration_losses(job, outcome)
            held_out = _held_out(job, plan_of(job, outcome))
    except KeyboardInterrupt:
        raise OrthoRankError(f"interrupted while the plan was measured; it is in {job.folder.plan}") from None
    plan = plan_of(job, outcome, loss=losses[1], dense_loss=losses[0])
    if outcome.scores:
        plan.calibration["scores"] = {str(layer): score for layer, score in outcome.scores.items()}
    tokens = min(FLOP_TOKENS, job.info.max_tokens)
    speedup = flop_speedup(job.model.config, tokens, plan.layers, plan.ratios)
    plan.measured = held_out | {"flop_speedup": round(speedup, 4), "flop_speedup_tokens": tokens}
    plan.save_pretrained(job.folder.path)
    results = {
        "rows": _rows(plan, losses, held_out, speedup),
        "plan": plan.to_dict(),
        "plan_file": str(job.folder.plan),
        "seconds": round(time.perf_counter() - job.began, 1),
    }
    job.folder.write(job.identity, results)
    return results


def _calibration_losses(job: Job, outcome: Outcome) -> tuple[float, float]:
    """Of the dense model and of the plan, in nats per token."""
    evaluator = evaluator_of(job)
    evaluator.start([], layers=job.candidates)
    return evaluator.loss([]), evaluator.loss(outcome.order)


def _held_out(job: Job, plan: OrthoRankConfig) -> dict[str, Any]:
    """Perplexity on windows that the search has not seen, by the patched model itself."""
    from orthorank.evaluation import perplexity
    from orthorank.handle import apply

    ids = job.calibration.held_out
    if ids is None:
        return {}
    figures: dict[str, Any] = {}
    for name, patched in (("dense_perplexity", None), ("perplexity", plan)):
        with nullcontext() if patched is None else apply(job.model, patched):
            figures[name] = perplexity(job.model, ids).perplexity
    windows, seq_len = ids.shape
    return figures | {"text": job.calibration.held_out_words, "windows": windows, "seq_len": seq_len}


def _rows(
    plan: OrthoRankConfig, losses: tuple[float, float], held_out: dict[str, Any], speedup: float
) -> list[dict[str, Any]]:
    dense = {"name": "dense", "layers": [], "keep_ratio": 1.0, "loss": losses[0], "flop_speedup": 1.0}
    found = {
        "name": "layer pruning" if plan.keep_ratio == 0 else "OrthoRank",
        "layers": plan.layers,
        "keep_ratio": plan.keep_ratio,
        "loss": losses[1],
        "flop_speedup": speedup,
    }
    return [
        dense | {"perplexity": held_out.get("dense_perplexity")},
        found | {"perplexity": held_out.get("perplexity")},
    ]
