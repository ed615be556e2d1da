"""``python -m contrib.budget`` without its terminal: a mixed plan, its Pareto front and a picture in a folder.

The plans of one form that the search begins from are searched first, each as a search of its own in the folder
``starts``, unless plan files are given.
"""

import dataclasses
from typing import TYPE_CHECKING, Any

from contrib.budget.budget import Effort, budget_search
from contrib.budget.costs import CostTable, count_flops, measure_seconds
from contrib.budget.finish import finish, write_front
from contrib.budget.pareto_plot import MISSING, can_draw
from contrib.budget.plan_loss import CalibrationLoss
from contrib.budget.plans import Space
from contrib.budget.plans import plan_of as ratios_of
from contrib.budget.search import Search
from contrib.budget.settings import BudgetSettings
from contrib.budget.state import BudgetInterrupted, BudgetState
from contrib.budget.watching import MixedWatcher
from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import user_path
from orthorank.common.progress import Screen, SilentScreen
from orthorank.config import OrthoRankConfig, layer_count
from orthorank.hf.apply import check_plan
from orthorank.search.job import Folder, Job, check_agreement, identity_of, plan_of, prepare
from orthorank.search.run import choose, saved_state
from orthorank.search.settings import candidates_of
from orthorank.stack.resources import joined, together

if TYPE_CHECKING:
    from torch import Tensor

STARTS = "starts"  # folder of the searches for plans of one form
FORMS = ("OrthoRank", "layer pruning")
KEEP_RATIOS = (0.0, 1 / 4, 1 / 3, 1 / 2)
PROMPT_TOKENS = 2048
# What decides a loss beside the layers and their ratios; a plan to begin from must have the same.
MODES = ("criterion", "select", "kv", "update_sink", "sinks", "seed")


def run_search(settings: BudgetSettings, screen: Screen | None = None) -> dict[str, Any]:
    """Search for a mixed plan and write it, and the front, to ``settings.output``.

    Arguments and errors as for `orthorank.search.run.run_search`.

    Returns:
        The results; ``rows`` has the dense model, the plans that the search began from, and the mixed plan.
    """
    with joined() as group:
        watched = screen if screen is not None and group.rank == 0 else SilentScreen()
        together(group, lambda: read_starts(settings))
        job = together(group, lambda: prepare(settings, watched, group))
        files = together(group, lambda: _fitting(job))
        job.identity = together(group, lambda: _identity(job, files))
        check_agreement(job)
        saved = saved_state(job, BudgetState.load)
        if not can_draw():
            job.screen.say(MISSING)
        search = _set_up(job, files if settings.starts else _searched(job), saved)
        return finish(search, _run(search))


def asked(job: Job) -> BudgetSettings:
    """The settings of a job that `run_search` has prepared."""
    assert isinstance(job.settings, BudgetSettings)
    return job.settings


def read_starts(settings: BudgetSettings) -> dict[str, OrthoRankConfig]:
    """The plans in the files that the settings name.

    Raises:
        OrthoRankError: one of them cannot be read, or is corrected.
    """
    paths = [path for path in settings.starts if path != "none"]
    found = {path: OrthoRankConfig.from_pretrained(user_path("start", path)) for path in paths}
    for path, plan in found.items():
        if plan.correction is not None:
            raise OrthoRankError(
                f"start is {path!r}, a corrected plan, and this search measures plans without maps; name the plan that "
                "it was before, and correct the one that is found"
            )
    return found


def _fitting(job: Job) -> dict[str, OrthoRankConfig]:
    """The same, checked against the model and against what this search measures."""
    given = read_starts(asked(job))
    wanted = OrthoRankConfig(layers=[], criterion=job.settings.criterion)
    for path, plan in given.items():
        check_plan(job.model, plan)
        for mode in MODES:
            if getattr(plan, mode) != getattr(wanted, mode) and plan.selecting:
                raise OrthoRankError(
                    f"start is {path!r}, whose {mode} is {getattr(plan, mode)!r}, and this search measures plans with "
                    f"{getattr(wanted, mode)!r}; name a plan that has the same"
                )
    return given


def _identity(job: Job, files: dict[str, OrthoRankConfig]) -> dict[str, Any]:
    """What decides the result, and so must not change between the parts of a resumed search."""
    settings = asked(job)
    starts: Any = "searched" if not settings.starts else {name: plan.to_dict() for name, plan in files.items()}
    return identity_of(job) | {
        "method": "budget",
        "budget": settings.budget,
        "budget_unit": settings.budget_unit,
        "prompt_tokens": _prompt_tokens(job),
        "keep_ratios": list(settings.keep_ratios or KEEP_RATIOS),
        "select": job.candidates,
        "skip": _skip(job),
        "starts": starts,
        "exchanges": _effort(job).exchanges,
    }


def _searched(job: Job) -> dict[str, OrthoRankConfig]:
    """The plans of one form at the nominal sparsity that the budget stands for, each from a search of its own."""
    found = {}
    for name, ratio in zip(FORMS, (job.settings.keep_ratio, 0.0), strict=True):
        form = _of_one_form(job, name, ratio)
        if form is None:
            continue
        job.screen.heading(f"{name}: {form.count} layers at keep ratio {words.ratio(ratio)}")
        _claim(form)
        outcome = choose(form)
        found[name] = plan_of(form, outcome)
        if form.first:
            found[name].save_pretrained(form.folder.path)
        job.screen.say(f"layers {words.layers(found[name].layers)}, loss {outcome.losses[-1]:.4f}")
    job.screen.heading(f"Mixed plans: {job.settings.title}")
    return found


def _claim(form: Job) -> None:
    """Its folder is inside that of this search, which may be written to: what is there is from an earlier run of it."""
    together(form.group, lambda: form.folder.claim(resume=True) if form.first else None)


def _of_one_form(job: Job, name: str, ratio: float) -> Job | None:
    """The search for a plan whose chosen layers all have ``ratio``; None: no layer is due, or more than there are."""
    settings = asked(job).of_one_form(ratio, job.settings.output / STARTS / name.replace(" ", "-").lower())
    sparsity, total = 1 - asked(job).budget, job.info.num_hidden_layers
    candidates = _candidates(job, ratio)
    try:
        count = layer_count(total, sparsity, ratio) if sparsity > 0 else 0
    except OrthoRankError:
        count = total + 1
    if not 0 < count <= len(candidates):
        reason = "less than one layer" if count == 0 else f"more than the {len(candidates)} layers that may change"
        share = f"{words.percent(sparsity)} of the layers at keep ratio {words.ratio(ratio)}"
        job.screen.say(f"no start from {name}: {share} is {reason}")
        return None
    form = dataclasses.replace(
        job, settings=settings, folder=Folder(settings.output), candidates=candidates, count=count
    )
    form.identity = identity_of(form)
    return form


def _candidates(job: Job, ratio: float) -> list[int]:
    settings = asked(job).of_one_form(ratio, job.settings.output)
    return candidates_of(settings, job.info.num_hidden_layers, job.sink_layer if settings.floored else None)


def _skip(job: Job) -> list[int]:
    return _candidates(job, 0.0) if 0 in (asked(job).keep_ratios or KEEP_RATIOS) else []


def _prompt_tokens(job: Job) -> int:
    wanted, most = asked(job).prompt_tokens, job.info.max_tokens
    if wanted is not None and wanted > most:
        raise OrthoRankError(f"prompt_tokens is {wanted}; the model's longest input has {most} tokens")
    return min(PROMPT_TOKENS, most) if wanted is None else wanted


def _effort(job: Job) -> Effort:
    wanted = asked(job).exchanges
    return Effort() if wanted is None else Effort(exchanges=wanted)


def _set_up(job: Job, starts: dict[str, OrthoRankConfig], saved: BudgetState | None) -> Search:
    if saved is not None:
        job.evaluator.use_batch_size(_batch_size_of(job, saved))
    ratios = tuple(asked(job).keep_ratios or KEEP_RATIOS)
    costs = _costs(job, {*ratios, *(r for plan in starts.values() for r in plan.ratios.values())}, saved)
    space = Space.of(costs, ratios, select=job.candidates, skip=_skip(job))
    return Search(job, space, CalibrationLoss(job.evaluator), starts, saved)


def _batch_size_of(job: Job, saved: BudgetState) -> int:
    """Windows that ran together in the earlier part of the search."""
    losses = saved.settings.get("losses")
    size = losses.get("batch_size") if isinstance(losses, dict) else None
    if type(size) is not int or size < 1:
        raise _no_state(job)
    return size


def _no_state(job: Job) -> OrthoRankError:
    return OrthoRankError(f"{job.folder.state} is not the state of a budget search; delete it to begin anew")


def _costs(job: Job, ratios: set[float], saved: BudgetState | None) -> CostTable:
    """FLOPs, or seconds: those of an earlier run of this search if there was one, else of the first process."""
    tokens = _prompt_tokens(job)
    if asked(job).budget_unit != "time":
        return count_flops(job.model.config, tokens, ratios, job.settings.correct or 0)
    if saved is not None:
        try:
            return CostTable.from_dict(saved.settings["costs"])
        except (KeyError, TypeError, ValueError):
            raise _no_state(job) from None
    with job.screen.progress("timing layers", 9) as advance:
        table = measure_seconds(
            job.stack, _random_prompt(job, tokens), ratios, on_round=lambda done, _: advance(done, "")
        )
    return CostTable.from_dict(job.group.share(table.to_dict()))


def _random_prompt(job: Job, tokens: int) -> "Tensor":
    import torch

    entries = job.model.get_input_embeddings().weight.shape[0]
    return torch.randint(0, entries, (1, tokens), generator=torch.Generator().manual_seed(0))


def _run(search: Search) -> BudgetState:
    """Search; Ctrl-C writes what was found until then.

    Raises:
        OrthoRankError: Ctrl-C; the message says how to go on.
    """
    job = search.job
    with job.screen.progress("mixed plans", 100) as advance:
        try:
            return budget_search(
                search.losses,
                search.space,
                search.budget,
                starts={name: ratios_of(plan) for name, plan in search.starts.items()},
                effort=_effort(job),
                state=search.saved,
                on_progress=MixedWatcher(advance, job.screen),
                save_to=job.folder.state if job.first else None,
            )
        except BudgetInterrupted as stop:
            kept = write_front(search, stop.state, complete=False) if job.first else ""
            raise OrthoRankError(f"{stop}{kept}; go on with the same command and --resume") from None
