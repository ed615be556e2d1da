"""The corrected rows: each plan with maps that put back part of what it leaves out, all fitted on the same tokens."""

import dataclasses

from orthorank.calibration.halves import fit_maps
from orthorank.common.errors import OrthoRankError
from orthorank.config import OrthoRankConfig
from orthorank.demo.run import Run
from orthorank.report import words

Plans = dict[str, OrthoRankConfig]


def with_corrected(run: Run, plans: Plans) -> Plans:
    """``plans`` as they are without maps, and each of them with maps; those of a given corrected plan are taken.

    The maps are fitted on the calibration windows, which the held-out ones share no token with.
    """
    found = {name: dataclasses.replace(plan, correction=None) for name, plan in plans.items()}
    rank = min(run.settings.rank, run.info.hidden_size)
    for name, plan in plans.items():
        if not rank and plan.correction is None:
            continue
        try:
            corrected = plan if plan.correction is not None else _fit(run, name, plan, rank)
        except OrthoRankError as error:  # a layer with nothing to explain; the other rows stand without its maps
            run.screen.say(f"{words.TITLES[name + words.CORRECTED]}: left out, since {error}")
            continue
        assert corrected.correction is not None
        record = corrected.calibration.get("correction", {})
        maps = {"rank": corrected.correction.rank, "tokens": record.get("tokens"), "given": corrected is plan}
        run.results["plans"][name]["maps"] = maps
        found[name + words.CORRECTED] = corrected
        run.save_plan(name + words.CORRECTED, corrected)
        run.save()
    return found


def _fit(run: Run, name: str, plan: OrthoRankConfig, rank: int) -> OrthoRankConfig:
    title, windows, text = words.TITLES[name + words.CORRECTED], run.calibration.windows, run.calibration.text
    with run.timed(f"maps {name}"):
        found = fit_maps(run.screen, title, run.model, windows, plan, rank=rank)
    record = found.calibration["correction"]
    record["texts"] = [{"text": text.name, "text_sha256": text.sha256, "windows": len(windows)}]
    record["bos"] = run.calibration.bos.policy
    shares = record["explained"].values()
    run.screen.say(
        f"{title}: maps of rank {rank}, fitted on {windows.numel():,} tokens, explain {min(shares):.0%} to "
        f"{max(shares):.0%} of what a layer leaves out"
    )
    return found
