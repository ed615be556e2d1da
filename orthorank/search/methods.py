"""The methods of `orthorank search`: each takes a job and says which layers it chose."""

from collections.abc import Callable
from typing import TypeVar

from orthorank.common.errors import OrthoRankError
from orthorank.search.distributed import together
from orthorank.search.greedy import begin_search, greedy_search
from orthorank.search.influence import block_influence
from orthorank.search.job import Job, Outcome, plan_of
from orthorank.search.one_shot import ScoreState, ScoringInterrupted, loss_scores, magnitude_scores, rank_layers
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.search.taylor import taylor_scores
from orthorank.search.watching import RoundWatcher, ScoreWatcher

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
    state = begin_search(job.evaluator, job.candidates, job.count, fast=job.settings.fast, state=saved)
    with job.screen.progress("search", state.total) as advance:
        if saved is not None:
            job.screen.say(f"resumed after {state.done} of {state.total} evaluations")
            advance(state.done, "")
        try:
            state = greedy_search(
                job.evaluator,
                job.candidates,
                job.count,
                fast=job.settings.fast,
                state=state,
                on_evaluation=RoundWatcher(advance, job.screen, state, job.stack.num_layers),
                save_to=job.folder.state,
            )
        except SearchInterrupted as stop:
            raise _interrupted(job, stop.state) from None
    return _outcome(state)


def _by_loss(job: Job) -> Outcome:
    saved = saved_state(job, ScoreState.load)
    total = len(job.candidates)
    with job.screen.progress("losses", total) as advance:
        if saved is not None:
            job.screen.say(f"resumed after {len(saved.scores)} of {total} evaluations")
            advance(len(saved.scores), "")
        try:
            state = loss_scores(
                job.evaluator,
                job.candidates,
                state=saved,
                on_score=ScoreWatcher(advance, job.candidates, job.stack.num_layers),
                save_to=job.folder.state,
            )
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
    return Outcome(rank_layers({at: scores[at] for at in job.candidates}, job.count), [], scores, evaluations)


def _outcome(state: SearchState) -> Outcome:
    return Outcome(state.chosen, state.losses, {}, state.done, state.complete)


def _interrupted(job: Job, state: SearchState) -> OrthoRankError:
    """The completed rounds are a plan of their own; it is written, and the message says how to go on."""
    kept = "no layer yet"
    if state.chosen:
        if job.first:
            plan_of(job, _outcome(state), loss=state.losses[-1]).save_pretrained(job.folder.path)
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
