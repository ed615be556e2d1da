"""The methods that score every layer once and take the lowest: one shot and block influence, with their bars."""

import math

from orthorank.common.errors import OrthoRankError
from orthorank.search.influence import block_influence
from orthorank.search.job import Job, Outcome
from orthorank.search.one_shot import ScoreState, ScoringInterrupted, loss_scores, magnitude_scores, rank_layers
from orthorank.search.taylor import taylor_scores
from orthorank.stack.resources import together


def choose_by_scores(job: Job) -> Outcome:
    """The layers by the job's method, which is not greedy. Called on every process of the job's group.

    Raises:
        OrthoRankError: the folder holds another search, or Ctrl-C; the message says how to go on.
    """
    if job.settings.method == "influence":
        return _by_influence(job)
    by_metric = {"ppl": _by_loss, "taylor": _by_taylor, "magnitude": _by_magnitude}
    return by_metric[job.settings.metric or "ppl"](job)


def _by_loss(job: Job) -> Outcome:
    saved = job.saved_state(ScoreState.load)
    total = len(job.candidates)
    with job.screen.progress("losses", total) as advance:
        if saved is not None:
            job.screen.say(f"resumed after {len(saved.scores)} of {total} evaluations")
            advance(len(saved.scores), "")
        best = (math.inf, -1)

        def on_score(layer: int, loss: float, done: int, total: int) -> None:
            nonlocal best
            best = min(best, (loss, layer)) if math.isfinite(loss) else best
            found = "" if best[1] < 0 else f"; best: layer {best[1]}, {best[0]:.4f}"
            advance(done, f"layer {layer}: {loss:.4f}{found}")

        try:
            state = loss_scores(job.evaluator, job.candidates, state=saved, on_score=on_score, save_to=job.folder.state)
        except ScoringInterrupted as stop:
            raise OrthoRankError(f"{stop}; go on with the same command and --resume") from None
    return _scored(job, state.finite, total)


def _by_taylor(job: Job) -> Outcome:
    _begin_anew(job)
    with job.screen.progress("backward pass", job.stack.num_layers) as advance:
        scores = taylor_scores(
            job.stack,
            job.calibration.windows,
            batch_size=job.evaluator.batch_size,
            processes=job.group,
            on_layer=lambda done, total: advance(done, f"layer {total - done}"),
        )
    return _scored(job, scores)


def _by_magnitude(job: Job) -> Outcome:
    _begin_anew(job)
    return _scored(job, magnitude_scores(job.stack))


def _by_influence(job: Job) -> Outcome:
    _begin_anew(job)
    windows, size = len(job.calibration.windows), job.evaluator.batch_size
    with job.screen.progress("block influence", windows if job.group.size == 1 else 0) as advance:
        scores = block_influence(
            job.stack,
            job.calibration.windows,
            batch_size=size,
            processes=job.group,
            on_batch=lambda done, total: advance(min(done * size, windows), ""),
        )
    return _scored(job, scores)


def _begin_anew(job: Job) -> None:
    """For methods of one pass: there is nothing to go on from, but the folder must be that of the same search."""
    together(job.group, lambda: job.first and job.folder.open(job.identity))


def _scored(job: Job, scores: dict[int, float], evaluations: int = 0) -> Outcome:
    return Outcome(rank_layers({at: scores[at] for at in job.candidates}, job.count), [], scores, evaluations)
