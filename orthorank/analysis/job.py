"""All analyses of a model, one after the other, with the figures and their data in one folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.criteria import check_criterion
from orthorank.common.errors import OrthoRankError, check_integers
from orthorank.common.files import writable_folder, write_json
from orthorank.common.progress import Screen, say_replaced
from orthorank.common.texts import check_bos, spread
from orthorank.config import OrthoRankConfig
from orthorank.plans import default_plans

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AnalysisSettings:
    """What `run_analysis` does; see ``orthorank analyze --help``.

    Raises:
        OrthoRankError: a number out of range, or a plan that cannot be read.
    """

    model: str | None = None
    text: Path | None = None
    output: Path = Path("orthorank-analysis")
    plans: tuple[str, ...] = ()
    criterion: str = "inverse"
    passages: int = 64
    passage_tokens: int = 32
    windows: int = 4
    window: int = 512
    keep_ratio: float = 1 / 3
    device: str = "auto"
    dtype: str | None = None
    bos: str = "auto"

    def __post_init__(self) -> None:
        check_integers(vars(self), passages=1, passage_tokens=12, windows=0, window=2)
        check_bos(self.bos)
        check_criterion(self.criterion)


def run_analysis(settings: AnalysisSettings, screen: Screen) -> dict[str, Any]:
    """Measure, draw, and write ``analysis.json``; what was measured is also returned."""
    from orthorank.analysis import figures
    from orthorank.analysis.layerwise import compare_layers
    from orthorank.analysis.similarity import measure_similarities
    from orthorank.common.texts import Bos, find_text, read_tokens
    from orthorank.models import load_model, locate
    from orthorank.speed.bench import read_plans
    from orthorank.stack.layers import LayerStack
    from orthorank.stack.sink import detect_sink

    plans = read_plans(settings.plans)
    text = find_text(settings.text)
    folder = writable_folder(settings.output)
    say_replaced(screen, folder, "analysis.json")
    with screen.progress(f"loading {locate(settings.model).name}", 1):
        model, tokenizer, info = load_model(settings.model, settings.device, settings.dtype)
    bos = Bos.of(settings.bos, tokenizer)
    ids = read_tokens(text, tokenizer, model, bos)
    sink = detect_sink(model, tokenizer, bos=settings.bos)
    screen.heading(f"{info.name}: {sink.reason}")
    screen.say(f"{text.name}; {bos}")
    stack = LayerStack(model)
    passages = _cut(ids, settings.passages, settings.passage_tokens, "passages", bos.leading).to(model.device)
    with screen.progress("similarities", 1):
        similar = measure_similarities(stack, passages)
    paths = figures.draw_similarities(similar, sink.sink_layer, folder)
    results: dict[str, Any] = {
        "model": info.to_dict(),
        "text": {"name": text.name, "sha256": text.sha256},
        "bos": bos.policy,
        "sink": sink.to_dict(),
        "similarities": similar.to_dict(),
    }
    write_json(folder / "analysis.json", results)
    if settings.windows:
        windows = _cut(ids, settings.windows, settings.window, "windows", bos.leading).to(model.device)
        # with the last layers, which the paper's Figure 4 shows, too; without a sink all but the first
        layers = range(1 if sink.sink_layer is None else sink.sink_layer + 1, stack.num_layers)
        with screen.progress("layer by layer", len(layers)) as advance:
            compared = compare_layers(
                stack,
                windows,
                layers,
                keep_ratio=settings.keep_ratio,
                criteria=("orthogonal", settings.criterion),
                on_layer=lambda done, total, one: advance(done, f"layer {one.layer}: {one.difference:+.2f}"),
            )
        paths += figures.draw_layerwise(compared, ("orthogonal", settings.criterion), folder)
        results["layerwise"] = [one.to_dict() for one in compared]
        results["criteria"] = ["orthogonal", settings.criterion]
        better = sum(one.margin > 0 for one in compared)
        others = "the others" if settings.criterion == "inverse" else f"those by {settings.criterion}"
        screen.say(f"Selecting the orthogonal tokens is better than {others} in {better} of {len(compared)} layers.")
    shown = plans or _shipped(model)
    if shown:
        ratios = {title: {layer: plan.ratio(layer) for layer in plan.layers} for title, plan in shown.items()}
        paths += figures.draw_chosen_layers(ratios, stack.num_layers, folder)
        results["plans"] = {title: plan.to_dict() for title, plan in shown.items()}
    write_json(folder / "analysis.json", results)
    screen.say(f"Figures: {', '.join(path.name for path in paths if path.suffix == '.png')} (and .svg) in {folder}")
    return results


def _cut(ids: "Tensor", count: int, length: int, name: str, leading: int | None) -> "Tensor":
    """``count`` pieces of ``length`` tokens at even distances, ``[count, length]``, ``leading`` before each if any."""
    body = length - (leading is not None)
    if len(ids) < count * body:
        raise OrthoRankError(
            f"the text has {len(ids):,} tokens, and {count} {name} of {length} need {count * body:,}; name a longer "
            f"text, or lower --{name}"
        )
    return spread(ids, count, length, leading)


def _shipped(model: Any) -> dict[str, OrthoRankConfig]:
    try:
        return default_plans(model)
    except OrthoRankError:
        return {}
