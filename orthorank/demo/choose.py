"""Which layers: from a search, a shipped plan, a file or a list, for OrthoRank and for layer pruning alike.

`intend` settles what is to be done, and raises when it cannot be; `carry_out` then takes a plan or searches for one.
"""

import dataclasses
from contextlib import AbstractContextManager
from dataclasses import dataclass

from orthorank.common import format as form
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import user_path
from orthorank.common.progress import Advance, Screen, SilentScreen
from orthorank.config import SPARSITY, OrthoRankConfig
from orthorank.demo.run import PLAN_FILES, Run
from orthorank.demo.settings import PLANS, Settings
from orthorank.hf.apply import check_plan
from orthorank.plans import default_plan, find_plan
from orthorank.report import words
from orthorank.search.job import Folder, Job, plan_of
from orthorank.search.run import greedy, outcome_of
from orthorank.search.settings import KEEP_RATIO, candidates_of, count_of
from orthorank.search.state import SearchInterrupted, SearchState
from orthorank.stack.layers import LayerStack
from orthorank.stack.resources import OneProcess
from orthorank.stack.sink import SinkReport


@dataclass(frozen=True)
class Intention:
    """How one row of the comparison gets its layers.

    Args:
        method: the row's name. origin: where the layers come from, in words.
        plan: the layers, when they are given. job: the search for them, when they are not.
    """

    method: str
    origin: str
    plan: OrthoRankConfig | None = None
    job: Job | None = None


class _Bars(SilentScreen):
    """Of a search the demo shows the bar alone."""

    def __init__(self, screen: Screen) -> None:
        self.screen = screen

    def progress(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """The demo's own."""
        return self.screen.progress(title, total)


def check_plan_file(settings: Settings) -> None:
    """A plan named by its path can be read. (Whether it fits the model is known when the model is.)"""
    if settings.plan in PLANS:
        return
    path = user_path("plan", settings.plan)
    if not path.exists():
        raise OrthoRankError(
            f"plan is {settings.plan!r}, and there is no such file or folder; it may be search, default, or the path "
            "of a plan (orthorank.json)"
        )
    OrthoRankConfig.from_pretrained(path)


def intend(run: Run, sink: SinkReport) -> list[Intention]:
    """What to do for OrthoRank and, where its sparsity is at least one layer, for layer pruning.

    Raises:
        OrthoRankError: a given plan does not fit, or the sparsity cannot be reached.
    """
    total = run.info.num_hidden_layers
    given, origin = _given_plan(run)
    shipped = run.settings.plan in PLANS and run.settings.layers is None and given is not None
    if given is not None and not given.selecting:  # a plan that only removes layers: it is the other row
        sparsity = given.nominal_sparsity(total)
        ortho = _search_intention(run, sink, "orthorank", sparsity, KEEP_RATIO)
        return [ortho, Intention("layer-pruning", origin, given)]
    if given is None:
        sparsity = run.settings.sparsity or SPARSITY
        if not run.settings.searches:
            run.screen.say("No plans are shipped for this model at this sparsity: the layers are searched")
        ortho = _search_intention(run, sink, "orthorank", sparsity, run.settings.keep_ratio or KEEP_RATIO)
    else:
        sparsity = (run.settings.sparsity or SPARSITY) if shipped else given.nominal_sparsity(total)
        ortho = Intention("orthorank", origin, given)
    removed = int(total * sparsity + 1e-6)
    if removed < 1:
        run.screen.say(f"{form.percent(sparsity)} of {total} layers is less than one: there is no layer to remove")
        return [ortho]
    if shipped and (pruning := find_plan(run.model, "layer-pruning", sparsity)) is not None:
        return [ortho, Intention("layer-pruning", _shipped_origin(pruning), pruning)]
    if (pruning := _given_pruning(run, removed)) is not None:
        return [ortho, Intention("layer-pruning", origin, pruning)]
    return [ortho, _search_intention(run, sink, "layer-pruning", sparsity, 0.0)]


def carry_out(run: Run, intention: Intention) -> OrthoRankConfig:
    """The plan for one row; it is in the output folder when this returns.

    Raises:
        SearchInterrupted: Ctrl-C; the layers found until then are saved as a plan.
    """
    title = words.TITLES[intention.method]
    if intention.job is not None:
        state = _search(run, intention.method, intention.job)
        plan, outcome = _keep(run, intention.method, intention.job, state), f"loss {state.losses[-1]:.3f}"
    else:
        assert intention.plan is not None
        plan, outcome = intention.plan, intention.origin
        run.results["plans"][intention.method] = {
            "layers": plan.layers,
            "keep_ratio": plan.keep_ratio,
            "keep_ratios": plan.to_dict()["keep_ratios"],
            "origin": intention.origin,
        }
        run.save_plan(intention.method, dataclasses.replace(plan, correction=None))
        if plan.correction is not None:  # it may have come from this very folder
            run.save_plan(intention.method + words.CORRECTED, plan)
    run.save()
    run.screen.say(f"{title}: layers {form.layers(plan.layers)}, {outcome}")
    return plan


def _given_plan(run: Run) -> tuple[OrthoRankConfig | None, str]:
    """The plan that the settings name, and where it is from; None for a search."""
    settings = run.settings
    if settings.layers is not None:
        ratio = settings.keep_ratio or KEEP_RATIO
        return OrthoRankConfig.for_model(run.model, layers=settings.layers, keep_ratio=ratio), "given by number"
    if settings.plan in PLANS:
        sparsity = settings.sparsity or SPARSITY
        if settings.plan == "default":
            plan = default_plan(run.model, sparsity=sparsity)
            return plan, _shipped_origin(plan)
        shipped = None if settings.searches else find_plan(run.model, sparsity=sparsity)
        return shipped, "" if shipped is None else _shipped_origin(shipped)
    plan = OrthoRankConfig.from_pretrained(user_path("plan", settings.plan))
    check_plan(run.model, plan)
    if not any(ratio < 1 for ratio in plan.ratios.values()):
        raise OrthoRankError(
            f"plan {settings.plan!r} changes nothing (layers {plan.layers}, keep_ratio {plan.keep_ratio:g}); the demo "
            "measures plans that select tokens in layers or remove some"
        )
    return plan, f"from {settings.plan}"


def _shipped_origin(plan: OrthoRankConfig) -> str:
    on = plan.calibration
    return f"shipped with the package, found on {on['tokens']:,} tokens of {on['text']}"


def _given_pruning(run: Run, removed: int) -> OrthoRankConfig | None:
    """Layers to remove that come with the given plan, if there are as many as wanted."""
    if run.settings.plan in PLANS:
        return None
    path = user_path("plan", run.settings.plan)
    file = (path if path.is_dir() else path.parent) / PLAN_FILES["layer-pruning"]
    if not file.is_file():
        return None
    plan = OrthoRankConfig.from_pretrained(file)
    check_plan(run.model, plan)
    return plan if plan.keep_ratio == 0 and len(plan.layers) == removed else None


def _search_intention(run: Run, sink: SinkReport, method: str, sparsity: float, keep_ratio: float) -> Intention:
    sink_layer = sink.sink_layer if run.settings.sink_layer is None else run.settings.sink_layer
    if sink_layer is None and keep_ratio > 0:
        raise OrthoRankError(
            f"{sink.reason}. OrthoRank has nothing to go by here; to try nevertheless, name the layer after which "
            "layers may be chosen with --sink-layer, or the layers with --layers"
        )
    settings = run.settings.search(sparsity=sparsity, keep_ratio=keep_ratio)
    total = run.info.num_hidden_layers
    candidates = candidates_of(settings, total, sink_layer if settings.floored else None)
    job = Job(
        settings=settings,
        screen=_Bars(run.screen),
        folder=Folder(run.folder),
        model=run.model,
        info=run.info,
        stack=LayerStack(run.model),
        calibration=run.calibration,
        sink_layer=sink_layer,
        candidates=candidates,
        count=count_of(settings, total, candidates),
        group=OneProcess(),
        began=run.began,
    )
    return Intention(method, "greedy search", job=job)


def _search(run: Run, method: str, job: Job) -> SearchState:
    """The search; what it has found is kept also when it is interrupted."""
    with run.timed(f"search {method}"):
        try:
            return greedy(job, words.TITLES[method])
        except SearchInterrupted as stop:
            _keep(run, method, job, stop.state)
            raise


def _keep(run: Run, method: str, job: Job, state: SearchState) -> OrthoRankConfig:
    """Note what a search has found so far, and save it as a plan once there is a layer."""
    run.results["plans"][method] = {
        "layers": state.plan,
        "keep_ratio": job.settings.keep_ratio,
        "origin": "greedy search",
        "candidates": job.candidates,
        "order": state.chosen,
        "losses": state.losses,
        "evaluations": state.done,
        "tokens": run.calibration.windows.numel(),
        "complete": state.complete,
    }
    plan = plan_of(job, outcome_of(state), loss=state.losses[-1] if state.losses else None)
    if plan.layers:
        run.save_plan(method, plan)
    return plan
