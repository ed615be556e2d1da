"""The methods of `orthorank search`: each takes a job and says which layers it chose."""

from collections.abc import Callable

from orthorank.errors import OrthoRankError
from orthorank.search.counts import evaluation_count
from orthorank.search.evaluator import Evaluator
from orthorank.search.greedy import greedy_search
from orthorank.search.job import Job, Outcome, batch_size, plan_of
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.search.watching import Watcher


def choose(job: Job) -> Outcome:
    """The layers by the job's method.

    Raises:
        OrthoRankError: the folder holds another search, or Ctrl-C; the message says how to go on.
    """
    return RUN[job.settings.method](job)


def evaluator_of(job: Job) -> Evaluator:
    """The calibration loss of the job."""
    return Evaluator(
        job.stack,
        job.calibration.windows,
        keep_ratio=job.settings.keep_ratio,
        criterion=job.settings.criterion,
        batch_size=batch_size(job),
    )


def _greedy(job: Job) -> Outcome:
    state = SearchState.load(job.folder.state) if job.folder.open(job.identity) else None
    total = evaluation_count(len(job.candidates), job.count)
    with job.screen.progress("greedy search", total) as advance:
        if state is not None:
            job.screen.say(f"resumed after {state.done} of {total} evaluations")
            advance(state.done, "")
        watch = Watcher(advance, job.screen, job.candidates, job.count, job.stack.num_layers)
        try:
            state = greedy_search(
                evaluator_of(job),
                job.candidates,
                job.count,
                state=state,
                on_evaluation=watch,
                save_to=job.folder.state,
            )
        except SearchInterrupted as stop:
            raise _interrupted(job, stop.state) from None
    return _outcome(state)


def _outcome(state: SearchState) -> Outcome:
    return Outcome(state.chosen, state.losses, {}, state.done, state.complete)


def _interrupted(job: Job, state: SearchState) -> OrthoRankError:
    """The completed rounds are a plan of their own; it is written, and the message says how to go on."""
    kept = "no layer yet"
    if state.chosen:
        plan_of(job, _outcome(state), loss=state.losses[-1]).save_pretrained(job.folder.path)
        kept = f"{len(state.chosen)} of {job.count} layers in {job.folder.plan}"
    return OrthoRankError(
        f"interrupted after {state.done} of {state.total} evaluations ({kept}); go on with the same command and "
        "--resume"
    )


RUN: dict[str, Callable[[Job], Outcome]] = {"greedy": _greedy}
