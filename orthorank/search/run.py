"""``orthorank search`` without its terminal: from the settings to a plan in a folder."""

import math
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.progress import Screen, SilentScreen
from orthorank.config import OrthoRankConfig
from orthorank.models import load_model, locate, pick_device, pick_dtype
from orthorank.search.calibration import cut_windows, find_source
from orthorank.search.greedy import begin_search, greedy_search
from orthorank.search.job import Folder, Job, Outcome, plan_of, sink_layer_of
from orthorank.search.settings import SearchSettings, candidates_of, count_of
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.stack.evaluator import Evaluator
from orthorank.stack.flops import plan_speedup
from orthorank.stack.layers import LayerStack
from orthorank.stack.resources import Group, joined, local_device, together


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
        check_agreement(job)
        outcome = choose(job)
        if settings.max_loss is not None:
            from orthorank.search.quality import within

            outcome = within(job, outcome, settings.max_loss, with_maps)
        return finish(job, outcome)


def prepare(settings: SearchSettings, screen: Screen, group: Group) -> Job:
    """What every search needs. What can go wrong early goes wrong here, the cheap things first.

    Raises:
        OrthoRankError: something is missing, or there are not as many candidates as layers to choose.
    """
    began = time.perf_counter()
    where, device = locate(settings.model), local_device(settings.device)
    pick_dtype(settings.dtype, pick_device(device))
    if settings.device_map is not None and group.size > 1:
        raise OrthoRankError(
            "device_map spreads the model of one process over the devices, and here are several processes; leave out "
            "--device-map, or start one process"
        )
    folder = Folder(settings.output)
    if group.rank == 0:
        folder.claim(settings.resume)
    with screen.progress("fetching the dataset", 1) if settings.dataset else nullcontext():
        source = find_source(settings)
    screen.heading(f"Search on {where.name}: {settings.title}")
    with screen.progress("loading the model", 1):
        model, tokenizer, info = load_model(settings.model, device, settings.dtype, device_map=settings.device_map)
    calibration = cut_windows(settings, source, model, tokenizer, info.max_tokens)
    shape = f"{info.num_hidden_layers} layers, {info.parameters / 1e6:,.0f} M weights, {info.dtype} on {info.device}"
    screen.say(shape if group.size == 1 else f"{shape}; {group.size} processes")
    screen.say(f"calibration: {calibration}; {calibration.bos}")
    sink_layer = sink_layer_of(settings, screen, model, tokenizer)
    candidates = candidates_of(settings, info.num_hidden_layers, sink_layer)
    held_out = 0 if calibration.held_out is None else len(calibration.held_out)
    if settings.max_loss is not None and held_out < 2:
        raise OrthoRankError(
            f"max_loss is judged on held-out windows, 2 or more, and here are {held_out}; give a longer text or more "
            "--windows"
        )
    count = count_of(settings, info.num_hidden_layers, candidates)
    within = f" of each window of {settings.selection['select_window']} tokens" if settings.selection else ""
    share = f"{words.ratio(settings.keep_ratio)} of the tokens"
    action = "remove" if settings.keep_ratio == 0 else f"update {share}{within} in"
    most = "at most " if settings.open_ended else ""
    screen.say(words.capital(f"{action} {most}{count} of the layers {words.layers(candidates)}."))
    return Job(
        settings=settings,
        screen=screen,
        folder=folder,
        model=model,
        info=info,
        stack=LayerStack(model),
        calibration=calibration,
        sink_layer=sink_layer,
        candidates=candidates,
        count=count,
        group=group,
        began=began,
    )


def check_agreement(job: Job) -> None:
    """All processes found the same model, text and candidates."""
    identities = job.group.collect(together(job.group, lambda: job.identity))
    for rank, other in enumerate(identities):
        if wrong := [name for name in other if other[name] != identities[0][name]]:
            raise OrthoRankError(
                f"process {rank} has another {wrong[0]} than process 0; give all of them the same model and text"
            )


def choose(job: Job) -> Outcome:
    """The layers by the job's method. Called on every process of the job's group.

    Raises:
        OrthoRankError: the folder holds another search, or Ctrl-C; the message says how to go on.
    """
    if job.settings.method != "greedy":
        from orthorank.search.scores import choose_by_scores

        return choose_by_scores(job)
    saved = job.saved_state(SearchState.load)
    try:
        return outcome_of(greedy(job, "search", saved, job.folder.state))
    except SearchInterrupted as stop:
        raise _interrupted(job, stop.state) from None


def greedy(job: Job, title: str, saved: SearchState | None = None, save_to: Path | None = None) -> SearchState:
    """SLEB's search on the job's windows, with a bar called ``title``. Arguments and errors as for `greedy_search`."""
    state = begin_search(job.evaluator, job.candidates, job.count, fast=job.settings.fast, state=saved)
    until = None
    if job.settings.open_ended:
        from orthorank.search.quality import far_enough

        until = partial(far_enough, job)
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
            until=until,
        )


def _expected(job: Job, layer: int, seconds: float, left: int) -> str:
    """How long the search will take, by its first evaluation: one of a layer computes that layer and those above."""
    depth = job.stack.num_layers
    usual = sum(depth - each for each in job.candidates) / len(job.candidates)
    most = "at most " if job.settings.open_ended else ""
    return f"{most}{left} evaluations are left, about {words.duration(seconds * left * usual / (depth - layer))}"


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

    from orthorank.calibration.halves import fit_maps

    how = {"rank": rank, "batch_size": job.evaluator.batch_size}
    return fit_maps(job.screen, "maps", job.model, cat([fit, job.calibration.windows]), plan, **how)


def _held_out(job: Job, plan: OrthoRankConfig) -> dict[str, Any]:
    """Perplexity on windows that the search has not seen. (It is that of the patched model, up to rounding.)"""
    ids = job.calibration.held_out
    if ids is None:
        return {}
    evaluator = Evaluator(
        job.stack, ids, criterion=plan.criterion, options=job.settings.selection, batch_size=1, memory=0
    )
    dense = evaluator.loss([])
    if plan.correction is None:
        loss = evaluator.loss(plan.ratios)
    else:  # which the evaluator knows nothing of
        from orthorank.evaluation import perplexity
        from orthorank.hf.apply import apply

        with apply(job.model, plan):
            loss = perplexity(job.model, ids).loss
    windows, window = ids.shape
    return {
        "dense_perplexity": _perplexity(dense),
        "perplexity": _perplexity(loss),
        "text": job.calibration.held_out_words,
        "windows": windows,
        "seq_len": window,
    }


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
