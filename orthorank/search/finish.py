"""The end of a search: the losses of the dense model and of the plan, held-out perplexity, and the files."""

import time
from contextlib import nullcontext
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.evaluation import flop_speedup
from orthorank.search.job import Job, Outcome, plan_of

FLOP_TOKENS = 2048  # prompt for which the FLOP-ideal speed-up is stated


def finish(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Write the plan at once, then measure it and write it again with the figures. Called on every process.

    Raises:
        OrthoRankError: Ctrl-C while measuring; the plan is there.
    """
    if job.first:
        plan_of(job, outcome).save_pretrained(job.folder.path)
    try:
        with job.screen.progress("measuring the plan", 1):
            dense_loss, loss = job.evaluator.loss([]), job.evaluator.loss(outcome.order)
            results = _write(job, outcome, dense_loss, loss) if job.first else {}
    except KeyboardInterrupt:
        raise OrthoRankError(f"interrupted while the plan was measured; it is in {job.folder.plan}") from None
    return job.group.share(results)


def _write(job: Job, outcome: Outcome, dense_loss: float, loss: float) -> dict[str, Any]:
    plan = plan_of(job, outcome, loss=loss, dense_loss=dense_loss)
    held_out = _held_out(job, plan)
    tokens = min(FLOP_TOKENS, job.info.max_tokens)
    speedup = flop_speedup(job.model.config, tokens, plan.layers, plan.ratios)
    plan.measured = held_out | {"flop_speedup": round(speedup, 4), "flop_speedup_tokens": tokens}
    plan.save_pretrained(job.folder.path)
    results = {
        "rows": _rows(plan, held_out, speedup),
        "plan": plan.to_dict(),
        "plan_file": str(job.folder.plan),
        "seconds": round(time.perf_counter() - job.began, 1),
    }
    job.folder.write(job.identity, results)
    return results


def _held_out(job: Job, plan: OrthoRankConfig) -> dict[str, Any]:
    """Perplexity on windows that the search has not seen, by the patched model itself."""
    from orthorank.evaluation import perplexity
    from orthorank.hf.apply import apply

    ids = job.calibration.held_out
    if ids is None:
        return {}
    figures: dict[str, Any] = {}
    for name, patched in (("dense_perplexity", None), ("perplexity", plan)):
        with nullcontext() if patched is None else apply(job.model, patched):
            figures[name] = perplexity(job.model, ids).perplexity
    windows, seq_len = ids.shape
    return figures | {"text": job.calibration.held_out_words, "windows": windows, "seq_len": seq_len}


def _rows(plan: OrthoRankConfig, held_out: dict[str, Any], speedup: float) -> list[dict[str, Any]]:
    losses = plan.calibration
    dense = {"name": "dense", "layers": [], "keep_ratio": 1.0, "loss": losses["dense_loss"], "flop_speedup": 1.0}
    found = {
        "name": "layer pruning" if plan.keep_ratio == 0 else "OrthoRank",
        "layers": plan.layers,
        "keep_ratio": plan.keep_ratio,
        "loss": losses["loss"],
        "flop_speedup": speedup,
    }
    return [
        dense | {"perplexity": held_out.get("dense_perplexity")},
        found | {"perplexity": held_out.get("perplexity")},
    ]
