"""Which layers: from a search, a shipped plan, a file or a list, for OrthoRank and for layer pruning alike.

`intend` settles what is to be done, and raises when it cannot be; `carry_out` then takes a plan or searches for one.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import user_path
from orthorank.config import OrthoRankConfig
from orthorank.demo.run import PLAN_FILES, Run
from orthorank.demo.settings import KEEP_RATIO, SPARSITY, Settings
from orthorank.hf.apply import check_plan
from orthorank.plans import default_plan

if TYPE_CHECKING:
    from orthorank.search import SearchState
    from orthorank.stack.sink import SinkReport

TOKENS_AT_ONCE = 1024  # in one forward of the search: more save little on a CPU, and their logits take memory


@dataclass(frozen=True)
class Intention:
    """How one row of the comparison gets its layers.

    Args:
        method: the row's name. origin: where the layers come from, in words.
        plan: the layers, when they are given; None: search ``count`` of the ``candidates`` for ``keep_ratio``.
        sink_layer: l_sink, for the plan that a search makes.
    """

    method: str
    origin: str
    plan: OrthoRankConfig | None = None
    keep_ratio: float = 0.0
    count: int = 0
    candidates: tuple[int, ...] = ()
    sink_layer: int | None = None


def check_plan_file(settings: Settings) -> None:
    """A plan named by its path can be read. (Whether it fits the model is known when the model is.)"""
    if settings.plan in ("search", "default"):
        return
    path = user_path("plan", settings.plan)
    if not path.exists():
        raise OrthoRankError(
            f"plan is {settings.plan!r}, and there is no such file or folder; it may be search, default, or the path "
            "of a plan (orthorank.json)"
        )
    OrthoRankConfig.from_pretrained(path)


def intend(run: Run, sink: "SinkReport") -> list[Intention]:
    """What to do for OrthoRank and, where its sparsity is at least one layer, for layer pruning.

    Raises:
        OrthoRankError: a given plan does not fit, or the sparsity cannot be reached.
    """
    total = run.info.num_hidden_layers
    given, origin = _given_plan(run)
    if given is not None and not given.selecting:  # a plan that only removes layers: it is the other row
        sparsity = given.nominal_sparsity(total)
        ortho = _search_intention(run, sink, "orthorank", sparsity, KEEP_RATIO)
        return [ortho, Intention("layer-pruning", origin, given)]
    if given is None:
        sparsity = run.settings.sparsity or SPARSITY
        ortho = _search_intention(run, sink, "orthorank", sparsity, run.settings.keep_ratio or KEEP_RATIO)
    else:
        sparsity = given.nominal_sparsity(total)
        ortho = Intention("orthorank", origin, given)
    removed = int(total * sparsity + 1e-6)
    if removed < 1:
        run.screen.say(f"{words.percent(sparsity)} of {total} layers is less than one: there is no layer to remove")
        return [ortho]
    pruning = _given_pruning(run, removed)
    if pruning is not None:
        return [ortho, Intention("layer-pruning", origin, pruning)]
    return [ortho, _search_intention(run, sink, "layer-pruning", sparsity, 0.0)]


def carry_out(run: Run, intention: Intention) -> OrthoRankConfig:
    """The plan for one row; it is in the output folder when this returns.

    Raises:
        SearchInterrupted: Ctrl-C; the layers found until then are saved as a plan.
    """
    title = words.TITLES[intention.method]
    if intention.plan is None:
        state = _search(run, intention)
        plan, outcome = _keep(run, intention, state), f"loss {state.losses[-1]:.3f}"
    else:
        plan, outcome = intention.plan, intention.origin
        run.results["plans"][intention.method] = {
            "layers": plan.layers,
            "keep_ratio": plan.keep_ratio,
            "keep_ratios": plan.to_dict()["keep_ratios"],
            "origin": intention.origin,
        }
        run.save_plan(intention.method, plan)
    run.save()
    run.screen.say(f"{title}: layers {words.layers(plan.layers)}, {outcome}")
    return plan


def _given_plan(run: Run) -> tuple[OrthoRankConfig | None, str]:
    """The plan that the settings name, and where it is from; None for a search."""
    settings = run.settings
    if settings.layers is not None:
        ratio = settings.keep_ratio or KEEP_RATIO
        return OrthoRankConfig.for_model(run.model, layers=settings.layers, keep_ratio=ratio), "given by number"
    if settings.plan == "search":
        return None, ""
    if settings.plan == "default":
        return default_plan(run.model), "shipped with the package"
    plan = OrthoRankConfig.from_pretrained(user_path("plan", settings.plan))
    check_plan(run.model, plan)
    if not any(ratio < 1 for ratio in plan.ratios.values()):
        raise OrthoRankError(
            f"plan {settings.plan!r} changes nothing (layers {plan.layers}, keep_ratio {plan.keep_ratio:g}); the demo "
            "measures plans that select tokens in layers or remove some"
        )
    return plan, f"from {settings.plan}"


def _given_pruning(run: Run, removed: int) -> OrthoRankConfig | None:
    """Layers to remove that come with the given plan, if there are as many as wanted."""
    if run.settings.plan == "default":
        return default_plan(run.model, "layer-pruning")
    path = user_path("plan", run.settings.plan)
    file = (path if path.is_dir() else path.parent) / PLAN_FILES["layer-pruning"]
    if run.settings.plan == "search" or not file.is_file():
        return None
    plan = OrthoRankConfig.from_pretrained(file)
    check_plan(run.model, plan)
    return plan if plan.keep_ratio == 0 and len(plan.layers) == removed else None


def _search_intention(run: Run, sink: "SinkReport", method: str, sparsity: float, keep_ratio: float) -> Intention:
    from orthorank.search import layer_count

    total, kept = run.info.num_hidden_layers, words.ratio(keep_ratio)
    candidates = _candidates(run, sink, keep_ratio)
    count = layer_count(total, sparsity, keep_ratio)
    if count < 1:
        raise OrthoRankError(
            f"sparsity is {sparsity:g}, which is less than one layer of {total} with keep ratio {kept}; the smallest "
            f"is {(1 - keep_ratio) / total:.3f}"
        )
    if count > len(candidates):
        largest = int(1000 * len(candidates) * (1 - keep_ratio) / total) / 1000
        raise OrthoRankError(
            f"sparsity is {sparsity:g}, which needs {count} layers with keep ratio {kept}, and only {len(candidates)} "
            f"may be chosen (layers {words.layers(candidates)}); the largest sparsity here is {largest}"
        )
    sink_layer = sink.sink_layer if run.settings.sink_layer is None else run.settings.sink_layer
    return Intention(method, "greedy search", None, keep_ratio, count, tuple(candidates), sink_layer)


def _candidates(run: Run, sink: "SinkReport", keep_ratio: float) -> list[int]:
    """Token selection: the layers after the sink. Removal: SLEB's own range, all but the first and the last layer."""
    from orthorank.stack.sink import candidate_layers

    total = run.info.num_hidden_layers
    if keep_ratio == 0:
        return list(range(1, total - 1))
    if run.settings.sink_layer is not None:
        return candidate_layers(run.settings.sink_layer, total)
    if sink.sink_layer is None:
        raise OrthoRankError(
            f"{sink.reason}. OrthoRank has nothing to go by here; to try nevertheless, name the layer after which "
            "layers may be chosen with --sink-layer, or the layers with --layers"
        )
    return candidate_layers(sink)


def _search(run: Run, intention: Intention) -> "SearchState":
    """Greedy search on the calibration windows; what it has found is kept also when it is interrupted."""
    from orthorank.search import Evaluator, SearchInterrupted, evaluation_count, greedy_search
    from orthorank.stack.layers import LayerStack

    count = intention.count
    windows = run.samples.calibration.to(run.model.device)
    evaluator = Evaluator(
        LayerStack(run.model),
        windows,
        keep_ratio=intention.keep_ratio,
        batch_size=max(1, TOKENS_AT_ONCE // windows.shape[1]),
    )
    total = evaluation_count(len(intention.candidates), count)
    progress = run.screen.progress(words.TITLES[intention.method], total)
    with run.timed(f"search {intention.method}"), progress as advance:

        def on_evaluation(number: int, layer: int, loss: float, best: float, done: int, total: int) -> None:
            advance(done, f"layer {number + 1} of {count}, best loss {best:.3f}")

        try:
            state = greedy_search(evaluator, intention.candidates, count, on_evaluation=on_evaluation)
        except SearchInterrupted as stop:
            _keep(run, intention, stop.state)
            raise
    return state


def _keep(run: Run, intention: Intention, state: "SearchState") -> OrthoRankConfig:
    """Note what a search has found so far, and save it as a plan once there is a layer."""
    run.results["plans"][intention.method] = {
        "layers": state.plan,
        "keep_ratio": intention.keep_ratio,
        "origin": intention.origin,
        "candidates": list(intention.candidates),
        "order": state.chosen,
        "losses": state.losses,
        "evaluations": state.done,
        "tokens": run.samples.calibration.numel(),
        "complete": state.complete,
    }
    plan = OrthoRankConfig.for_model(
        run.model,
        layers=state.plan,
        keep_ratio=intention.keep_ratio,
        sink_layer=intention.sink_layer,
        calibration=_calibration(run, intention, state),
    )
    if plan.layers:
        run.save_plan(intention.method, plan)
    return plan


def _calibration(run: Run, intention: Intention, state: "SearchState") -> dict[str, Any]:
    windows, seq_len = run.samples.calibration.shape
    return {
        "text": run.text.name,
        "text_sha256": run.text.sha256,
        "tokens": windows * seq_len,
        "windows": windows,
        "seq_len": seq_len,
        "bos": run.results["bos"],
        "method": f"greedy search (SLEB) among layers {words.layers(list(intention.candidates))}",
        "loss": state.losses[-1] if state.losses else None,
        "complete": state.complete,
    }
