"""A whole search: from settings to a plan in a folder."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.progress import Screen, SilentScreen
from orthorank.config import OrthoRankConfig
from orthorank.search.greedy import begin_search, greedy_search
from orthorank.search.job import Job, Outcome, aim, check_agreement, plan_of, prepare
from orthorank.search.settings import SearchSettings
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.flops import plan_speedup
from orthorank.stack.resources import joined, together

if TYPE_CHECKING:
    from torch import Tensor


def run_search(settings: SearchSettings, screen: Screen | None = None) -> dict[str, Any]:
    """Choose layers and write the plan to ``settings.output``.

    Args:
        settings: what to do. screen: what happens is shown on it; None: nowhere.

    Returns:
        The results, as ``search.json`` in the folder holds them: ``rows`` (the dense model and the plan), ``plan``,
        ``plan_file``, ``order``, ``losses``, ``scores``, ``seconds``; with ``max_loss`` ``prefixes``: each plan of the
        path that was measured on the held-out windows.

    Raises:
        NothingWithin: no plan is within ``settings.max_loss``.
        OrthoRankError: something is wrong or missing, or the search was interrupted; then the message says how to go
            on with it.
    """
    with joined() as group:
        watched = screen if screen is not None and group.rank == 0 else SilentScreen()
        job = together(group, lambda: prepare(settings, watched, group))
        together(group, lambda: aim(job))
        check_agreement(job)
        outcome = choose(job)
        if settings.max_loss is not None:
            from orthorank.search.quality import within

            outcome = within(job, outcome, settings.max_loss, with_maps)
        return finish(job, outcome)


S = TypeVar("S")


def choose(job: Job) -> Outcome:
    """The layers by the job's method. Called on every process of the job's group.

    Raises:
        OrthoRankError: the folder holds another search, or Ctrl-C; the message says how to go on.
    """
    method = job.settings.method
    if method == "one-shot":
        return ONE_SHOT[job.settings.metric or "ppl"](job)
    return RUN[method](job)


def _greedy(job: Job) -> Outcome:
    saved = saved_state(job, SearchState.load)
    try:
        return outcome_of(greedy(job, "search", saved, job.folder.state))
    except SearchInterrupted as stop:
        raise _interrupted(job, stop.state) from None


def greedy(job: Job, title: str, saved: SearchState | None = None, save_to: Path | None = None) -> SearchState:
    """SLEB's search on the job's windows, with a bar called ``title``. Arguments and errors as for `greedy_search`."""
    state = begin_search(job.evaluator, job.candidates, job.count, fast=job.settings.fast, state=saved)
    began, before = time.perf_counter(), state.done
    with job.screen.progress(title, state.total) as advance:
        if saved is not None:
            job.screen.say(f"resumed after {state.done} of {state.total} evaluations")
            advance(state.done, "")

        def on_evaluation(number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
            if done == before + 1:
                job.screen.say(_expected(job, layer, time.perf_counter() - began, total - done))
            over = len(state.chosen) > number
            found = state.chosen[-1] if over else state.best[1]
            advance(done, f"round {number + 1}/{state.rounds}, layer {layer}; best: layer {found}, {best:.4f}")
            if over:
                rounds = f"round {number + 1} of {state.rounds}"
                job.screen.say(f"{rounds}: best loss {state.losses[-1]:.4f} (layer {found})")

        return greedy_search(
            job.evaluator,
            job.candidates,
            job.count,
            fast=job.settings.fast,
            state=state,
            on_evaluation=on_evaluation,
            save_to=save_to,
            until=_until(job),
        )


def _expected(job: Job, layer: int, seconds: float, left: int) -> str:
    """How long the search will take, by its first evaluation: one of a layer computes that layer and those above."""
    depth = job.stack.num_layers
    usual = sum(depth - each for each in job.candidates) / len(job.candidates)
    most = "at most " if job.settings.open_ended else ""
    return f"{most}{left} evaluations are left, about {words.duration(seconds * left * usual / (depth - layer))}"


def _until(job: Job) -> Callable[[SearchState], bool] | None:
    """When the path of a search without a number of layers has gone far enough."""
    if not job.settings.open_ended:
        return None
    from orthorank.search.quality import far_enough

    return lambda state: far_enough(job, state)


def _by_loss(job: Job) -> Outcome:
    from orthorank.search.one_shot import ScoreState, ScoringInterrupted, loss_scores

    saved = saved_state(job, ScoreState.load)
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
    from orthorank.search.taylor import taylor_scores

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
    from orthorank.search.one_shot import magnitude_scores

    _begin_anew(job)
    return _scored(job, magnitude_scores(job.stack))


def _by_influence(job: Job) -> Outcome:
    from orthorank.search.influence import block_influence

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


def saved_state(job: Job, load: Callable[[str], S]) -> S | None:
    """The state that rank 0 finds in the folder, on every process; None: this is the beginning.

    Raises:
        OrthoRankError: it is the state of another search.
    """

    def open_folder() -> S | None:
        if job.first and job.folder.open(job.identity):
            return load(str(job.folder.state))
        return None

    return job.group.share(together(job.group, open_folder))


def _begin_anew(job: Job) -> None:
    """For methods of one pass: there is nothing to go on from, but the folder must be that of the same search."""
    together(job.group, lambda: job.first and job.folder.open(job.identity))


def _scored(job: Job, scores: dict[int, float], evaluations: int = 0) -> Outcome:
    from orthorank.search.one_shot import rank_layers

    return Outcome(rank_layers({at: scores[at] for at in job.candidates}, job.count), [], scores, evaluations)


def outcome_of(state: SearchState) -> Outcome:
    """What a greedy search has found so far."""
    return Outcome(state.chosen, state.losses, {}, state.done, state.complete)


def _interrupted(job: Job, state: SearchState) -> OrthoRankError:
    """The completed rounds are a plan of their own; it is written, and the message says how to go on."""
    kept = "no layer yet"
    if state.chosen:
        if job.first:
            plan_of(job, outcome_of(state), loss=state.losses[-1]).save_pretrained(job.folder.path)
        kept = f"{len(state.chosen)} of {job.count} layers in {job.folder.plan}"
    return OrthoRankError(
        f"interrupted after {state.done} of {state.total} evaluations ({kept}); go on with the same command and "
        "--resume"
    )


RUN: dict[str, Callable[[Job], Outcome]] = {"greedy": _greedy, "influence": _by_influence}
ONE_SHOT: dict[str, Callable[[Job], Outcome]] = {
    "ppl": _by_loss,
    "taylor": _by_taylor,
    "magnitude": _by_magnitude,
}


def finish(job: Job, outcome: Outcome) -> dict[str, Any]:
    """Write the plan at once, then measure it and write it again with the figures. Called on every process.

    Raises:
        OrthoRankError: Ctrl-C while measuring; the plan is there.
    """
    if job.first:
        plan_of(job, outcome).save_pretrained(job.folder.path)
    try:
        with job.screen.progress("measuring the plan", 1):
            job.evaluator.start(outcome.order)
            dense_loss, loss = job.evaluator.loss([]), job.evaluator.loss(outcome.order)
            results = _write(job, outcome, dense_loss, loss) if job.first else {}
    except KeyboardInterrupt:
        raise OrthoRankError(f"interrupted while the plan was measured; it is in {job.folder.plan}") from None
    return job.group.share(results)


def _write(job: Job, outcome: Outcome, dense_loss: float, loss: float) -> dict[str, Any]:
    plan = with_maps(job, plan_of(job, outcome, loss=loss, dense_loss=dense_loss))
    held_out = _held_out(job, plan)
    tokens = job.flop_tokens
    speedup = plan_speedup(job.model.config, tokens, plan)
    plan.measured = held_out | {"flop_speedup": round(speedup, 4), "flop_speedup_tokens": tokens}
    plan.measured |= {} if outcome.rise is None else {"rise": outcome.rise}
    plan.save_pretrained(job.folder.path)
    results = {
        "rows": _rows(plan, held_out, speedup),
        "plan": plan.to_dict(),
        "plan_file": str(job.folder.plan),
        "seconds": round(time.perf_counter() - job.began, 1),
    } | ({} if outcome.rise is None else {"max_loss": job.settings.max_loss, "prefixes": outcome.prefixes})
    job.folder.write(job.identity, results)
    return results


def with_maps(job: Job, plan: OrthoRankConfig) -> OrthoRankConfig:
    """The plan with its maps fitted once more, to all windows of the search; without maps, as it is."""
    fit, rank = job.calibration.fit, job.settings.correct
    if fit is None or rank is None:
        return plan
    from torch import cat

    from orthorank.calibration.corrections import fit_correction

    with job.screen.progress("maps", 1 + max(plan.layers)) as advance:
        return fit_correction(
            job.model,
            cat([fit, job.calibration.windows]),
            plan,
            rank=rank,
            batch_size=job.evaluator.batch_size,
            on_layer=lambda done, *_: advance(done, ""),
        )


def _held_out(job: Job, plan: OrthoRankConfig) -> dict[str, Any]:
    """Perplexity on windows that the search has not seen. (It is that of the patched model, up to rounding.)"""
    ids = job.calibration.held_out
    if ids is None:
        return {}
    evaluator = Evaluator(
        job.stack, ids, criterion=plan.criterion, options=job.settings.selection, batch_size=1, memory=0
    )
    dense, loss = evaluator.loss([]), evaluator.loss(plan.ratios) if plan.correction is None else _loss(job, plan, ids)
    figures = {"dense_perplexity": _perplexity(dense), "perplexity": _perplexity(loss)}
    windows, window = ids.shape
    return figures | {"text": job.calibration.held_out_words, "windows": windows, "seq_len": window}


def _loss(job: Job, plan: OrthoRankConfig, ids: "Tensor") -> float:
    """Of the plan with the maps it has."""
    from orthorank.evaluation import perplexity
    from orthorank.hf.apply import apply

    with apply(job.model, plan):
        return perplexity(job.model, ids).loss


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf  # what a float holds


def _rows(plan: OrthoRankConfig, held_out: dict[str, Any], speedup: float) -> list[dict[str, Any]]:
    losses = plan.calibration
    dense = {"name": "dense", "layers": [], "keep_ratio": 1.0, "loss": losses["dense_loss"], "flop_speedup": 1.0}
    found = {
        "name": ("layer pruning" if plan.keep_ratio == 0 else "OrthoRank") + (", corrected" if plan.correction else ""),
        "layers": plan.layers,
        "keep_ratio": plan.keep_ratio,
        "loss": losses["loss"],
        "flop_speedup": speedup,
    }
    return [
        dense | {"perplexity": held_out.get("dense_perplexity")},
        found | {"perplexity": held_out.get("perplexity")},
    ]
