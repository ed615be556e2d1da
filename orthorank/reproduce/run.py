"""The whole reproduction: part after part, each finished cell kept, the summary written after each part."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from orthorank.analysis import figures
from orthorank.analysis.layerwise import LayerComparison, compare_layers
from orthorank.analysis.similarity import Similarities, measure_similarities
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import finite, read_json, writable_folder, write_json, write_text
from orthorank.common.progress import Screen, SilentScreen
from orthorank.reproduce import tables
from orthorank.reproduce.claims import check_claims
from orthorank.reproduce.markdown import markdown, titled
from orthorank.reproduce.settings import PARTS, ReproduceSettings
from orthorank.reproduce.subject import KEEP_RATIO, Subject, ids_hash
from orthorank_kernels._version import __version__

SIMILARITY_FIGURES = ("fig2", "fig3", "fig6", "fig7")
SIMILARITIES, LAYERWISE = "similarities", "layerwise"  # under which these figures' data are in the summary
PASSAGES, PASSAGE_TOKENS = 500, 32  # the paper's 500 sentences


def reproduce(settings: ReproduceSettings, screen: Screen | None = None) -> dict[str, Any]:
    """Measure every part of ``settings`` and write ``summary.json``, ``tables.md`` and pictures to its folder.

    A run that was stopped, however, goes on where it was: cells that are finished are not computed again.

    Returns:
        The summary: the setting, a key for each part, and ``claims``.

    Raises:
        OrthoRankError: something cannot be loaded or written.
    """
    folder = writable_folder(settings.output)
    subject = Subject(settings, screen or SilentScreen())
    summary: dict[str, Any] = {
        "version": __version__,
        "model": subject.info.to_dict(),
        "settings": _plain(settings),
        "texts": {name: {"name": text.name, "sha256": text.sha256} for name, text in subject.texts.items()},
        "sizes": _sizes(subject),
        "sink": subject.sink,
    }
    about = set(summary)
    for part in settings.parts:
        subject.screen.heading(part)
        summary |= _measured(part, subject, folder)
        summary = _with_earlier_parts(folder, summary, about)
        summary["claims"] = [claim.to_dict() for claim in check_claims(summary)]
        write_json(folder / "summary.json", summary)
        write_text(folder / "tables.md", markdown(summary))
    subject.screen.say(f"{subject.cells.computed} cells computed, {subject.cells.found} found finished")
    return summary


def _measured(part: str, subject: Subject, folder: Path) -> dict[str, Any]:
    if part in SIMILARITY_FIGURES:
        return {SIMILARITIES: _similarities(subject, folder)}
    if part == "fig4":
        return {LAYERWISE: _layerwise(subject, folder)}
    if part == "fig5":
        return {"fig5": _chosen(subject, folder)}
    if part == "longbench":
        return _longbench(subject)
    return {part: getattr(tables, part)(subject)}  # table1, ..., sweep, corrected


def _longbench(subject: Subject) -> dict[str, Any]:
    if subject.settings.longbench is None:
        subject.screen.say("left out: no questions were named")
        return {}
    found = tables.longbench(subject)
    if not found["questions"]:
        subject.screen.say(f"left out: every prompt has more than {subject.settings.longbench_tokens} tokens")
        return {}
    return {"longbench": found}


def _similarities(subject: Subject, folder: Path) -> dict[str, Any]:
    ids = next(iter(subject.windows.values())).flatten()
    count = min(PASSAGES, len(ids) // PASSAGE_TOKENS)
    if count < 1:
        raise OrthoRankError(f"the first text has {len(ids)} tokens; passages of {PASSAGE_TOKENS} are needed")
    distance = len(ids) // count
    passages = ids.unfold(0, PASSAGE_TOKENS, distance)[:count]

    def measure() -> dict[str, Any]:
        with subject.screen.progress("similarities", 1):
            return measure_similarities(subject.stack, passages).to_dict()

    inputs = {"passages": count, "tokens": PASSAGE_TOKENS}
    found = subject.cells.get("similarities", inputs, measure, text=ids_hash(passages))
    figures.draw_similarities(Similarities(**found), subject.sink["sink_layer"], folder)
    return found


def _layerwise(subject: Subject, folder: Path) -> list[dict[str, Any]]:
    layers = list(range(subject.floor, subject.num_layers))
    windows = next(iter(subject.windows.values()))[:8]

    def measure() -> list[dict[str, Any]]:
        with subject.screen.progress("layer by layer", len(layers)) as advance:
            compared = compare_layers(
                subject.stack,
                windows,
                layers,
                keep_ratio=KEEP_RATIO,
                on_layer=lambda done, total, one: advance(done, f"layer {one.layer}: {one.difference:+.2f}"),
            )
        return [one.to_dict() for one in compared]

    inputs = {"layers": layers, "windows": list(windows.shape)}
    found = subject.cells.get("layerwise", inputs, measure, text=ids_hash(windows))
    compared = [LayerComparison(one["layer"], tuple(one["losses"]), tuple(one["other_losses"])) for one in found]
    figures.draw_layerwise(compared, ("orthogonal", "inverse"), folder)
    return found


def _chosen(subject: Subject, folder: Path) -> dict[str, Any]:
    plans = {name: plan for name, plan in tables.main_plans(subject).items() if plan is not None and "20" in name}
    ratios = {titled(name): {layer: plan.ratio(layer) for layer in plan.layers} for name, plan in plans.items()}
    if ratios:
        figures.draw_chosen_layers(ratios, subject.num_layers, folder)
    return {name: {"layers": plan.layers, "keep_ratio": plan.keep_ratio} for name, plan in plans.items()}


def _with_earlier_parts(folder: Path, summary: dict[str, Any], about: set[str]) -> dict[str, Any]:
    """``summary`` with the parts that an earlier run, or one beside it, of the same model and settings has written."""
    try:
        earlier = read_json(folder / "summary.json")
    except (OSError, ValueError):  # there is none; whatever it was, its cells are there
        return summary
    now = json.loads(json.dumps(finite({name: summary[name] for name in about})))
    if not isinstance(earlier, dict) or any(earlier.get(name) != value for name, value in now.items()):
        return summary
    parts = (SIMILARITIES, LAYERWISE, *PARTS)
    kept = {name: earlier[name] for name in parts if name in earlier and name not in summary}
    return summary | kept


def _sizes(subject: Subject) -> dict[str, Any]:
    windows, length = subject.calibration.shape
    return {
        "calibration": {"text": subject.calibration_name, "windows": windows, "tokens": windows * length},
        "held_out": {name: {"windows": len(w), "tokens": w.numel()} for name, w in subject.windows.items()},
        "task_rows": subject.settings.task_limit or "all",
        "longest_longbench_prompt": subject.settings.longbench_tokens or "all",
    }


def _plain(settings: ReproduceSettings) -> dict[str, Any]:
    fields = dataclasses.asdict(settings)
    fields = {name: value for name, value in fields.items() if name not in ("output", "only", "criteria")}
    return {name: str(value) if isinstance(value, Path) else value for name, value in fields.items()}
