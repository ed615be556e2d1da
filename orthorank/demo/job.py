"""The steps of the demo, in order.

Each step's results are saved as it finishes: ``results.json``, ``report.html`` and the plans in the output folder are
whole files at any time, also after Ctrl-C.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from orthorank.common import format as form
from orthorank.common.environment import environment
from orthorank.common.errors import OrthoRankError
from orthorank.common.files import check_free, user_path, writable_folder
from orthorank.common.progress import Screen, SilentScreen, say_replaced
from orthorank.common.texts import remark_on
from orthorank.demo import choose, measure
from orthorank.demo.correct import with_corrected
from orthorank.demo.run import PLAN_FILES, REPORT, RESULTS, Run
from orthorank.demo.settings import Settings
from orthorank.evaluation.compare import inputs_of
from orthorank.evaluation.prompts import read_prompts
from orthorank.models import load_model, locate, pick_device
from orthorank.search.calibration import cut_windows, find_source
from orthorank.stack.sink import SinkReport, detect_sink
from orthorank_kernels._version import __version__


def run_demo(
    settings: Settings, screen: Screen | None = None, on_quality: Callable[[dict[str, Any]], None] | None = None
) -> dict[str, Any]:
    """Run the main job.

    Args:
        settings: what to do. screen: what happens is shown on it; None: nowhere.
        on_quality: called with the results once perplexity is known, before speed is measured.

    Returns:
        The results, as ``results.json`` in ``settings.output`` holds them.

    Raises:
        OrthoRankError: something is wrong or missing, or the run was interrupted; then the message says where the
            partial result is.
    """
    run = _prepare(settings, screen or SilentScreen())
    sink = _look_at_sink(run)
    intentions = choose.intend(run, sink)
    run.save()  # first: an earlier run's plans stay when it turns out that nothing can be written
    run.forget_plans()
    try:
        run.screen.heading("2  The plans")
        plans = {intention.method: choose.carry_out(run, intention) for intention in intentions}
        plans = with_corrected(run, plans)
        run.screen.heading("3  Perplexity")
        measure.quality(run, plans)
        if on_quality is not None:
            on_quality(run.results)
        run.screen.heading("4  Speed")
        measure.speed(run, plans)
        if run.prompts:
            run.screen.heading("5  Answers")
            measure.answers(run, plans)
        run.results["complete"] = True
        run.save()
    except KeyboardInterrupt:
        run.save()
        kept = [name for name in (RESULTS, REPORT, *PLAN_FILES.values()) if (run.folder / name).is_file()]
        raise OrthoRankError(f"interrupted; what was found until then is in {run.folder}: {', '.join(kept)}") from None
    return run.results


def _prepare(settings: Settings, screen: Screen) -> Run:
    """Everything that can go wrong early goes wrong here, the cheap things first."""
    began = time.perf_counter()
    source, where = find_source(settings.search()), locate(settings.model)
    pick_device(settings.device)
    choose.check_plan_file(settings)
    prompts = [] if settings.prompts is None else read_prompts(settings.prompts)
    if not (user_path("output", settings.output) / RESULTS).exists():  # an earlier demo's plans are replaced
        check_free(settings.output)
    folder = writable_folder(settings.output)
    say_replaced(screen, folder, RESULTS, REPORT, *PLAN_FILES.values())
    screen.heading(f"OrthoRank on {where.name}")
    with screen.progress("loading the model", 1) as advance:
        model, tokenizer, info = load_model(settings.model, settings.device)
        advance(1, "")
    settings.check_layers(info.num_hidden_layers)
    if prompts:
        inputs_of(model, tokenizer, prompts, measure.ANSWER_TOKENS, settings.bos)
    calibration = cut_windows(
        settings.search(),
        source,
        model,
        tokenizer,
        info.max_tokens,
        held_out=(settings.held_out_windows, settings.held_out_len),
    )
    run = Run(settings, screen, folder, model, tokenizer, info, calibration, began, prompts)
    run.results |= _preamble(run)
    shape = f"{info.num_hidden_layers} layers, {info.parameters / 1e6:,.0f} M weights, {info.dtype} on {info.device}"
    screen.say(f"{shape}; text: {source.text.name}, {calibration.text_tokens:,} tokens; {calibration.bos}")
    if (remark := remark_on(source.text, options="--text FILE")) is not None:
        screen.say(remark)
    run.results["bos"] = calibration.bos.policy
    return run


def _preamble(run: Run) -> dict[str, Any]:
    text = run.calibration.text
    return {
        "format": 1,
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "complete": False,
        "model": run.info.name,
        "text": text.name,
        "rows": [],
        "plans": {},
        "settings": run.settings.to_dict(),
        "model_info": run.info.to_dict(),
        "text_info": {"name": text.name, "sha256": text.sha256, "tokens": run.calibration.text_tokens},
        "environment": environment().to_dict(),
        "seconds": {"loading": round(time.perf_counter() - run.began, 1)},
    }


def _look_at_sink(run: Run) -> SinkReport:
    run.screen.heading("1  The sink token")
    with run.timed("sink"):
        sink = detect_sink(run.model, run.tokenizer, bos=run.settings.bos)
    run.results["sink"] = sink.to_dict()
    run.screen.say(form.sink_sentence(run.results["sink"]))
    return sink
