"""Quality first: of the plans on a greedy path, the one with the fewest FLOPs that keeps the held-out loss.

Each prefix of the order in which layers were chosen is a plan. They are measured on the held-out windows, each window
paired with the dense model's, those with the fewest FLOPs first, until one is within the loss.
"""

import copy
import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from orthorank.common import format as words
from orthorank.common.errors import OrthoRankError
from orthorank.common.paired import is_within, rise_of
from orthorank.common.progress import SilentScreen
from orthorank.config import FILE_NAME, OrthoRankConfig
from orthorank.correction import FILE_NAME as MAPS
from orthorank.evaluation.kept import KeptRows
from orthorank.evaluation.perplexity import perplexity
from orthorank.hf.apply import apply
from orthorank.search.job import NEWER, Job, NothingWithin, Outcome, plan_of
from orthorank.search.state import SearchState
from orthorank.stack.flops import flop_speedup
from orthorank.stack.resources import together

WithMaps = Callable[[Job, OrthoRankConfig], OrthoRankConfig]

PREFIXES = "search-prefixes.jsonl"

# A path goes on until its rise on the calibration windows, to which layers and maps are chosen, is this many times what
# the held-out loss may rise: the held-out rise is rarely smaller, and two standard errors are added to it, so a plan
# beyond has next to no chance. A path that is too long costs time alone.
MARGIN = 2.0


def far_enough(job: Job, state: SearchState) -> bool:
    """Whether a path without a number of layers need not go on."""
    most = job.settings.max_loss
    if most is None or not state.losses:
        return False
    return state.losses[-1] - job.dense_loss > MARGIN * most


def within(job: Job, outcome: Outcome, most: float, with_maps: WithMaps) -> Outcome:
    """The part of ``outcome`` with the fewest FLOPs whose held-out loss rises by ``most`` at most, two errors included.

    Called on every process of the job's group; the first one measures. ``with_maps`` gives a plan the maps that a final
    plan of the job has.

    Raises:
        NothingWithin: there is none.
        OrthoRankError: Ctrl-C; what is measured is kept, and the message says how to go on.
    """
    rows = job.group.share(together(job.group, lambda: _measured(job, outcome, most, with_maps) if job.first else []))
    found = next((row for row in rows if is_within(row, most)), None)
    if found is None:
        if job.first:
            job.folder.write(job.identity, {"max_loss": most, "plan": None, "prefixes": rows})
            for name in (FILE_NAME, MAPS):  # of an interrupted part or a larger loss, whose rows are kept
                (job.folder.path / name).unlink(missing_ok=True)
        raise NothingWithin(_sentence(rows, most), rows)
    count = len(found["layers"])
    rise = {name: found[name] for name in ("mean", "standard_error", "n")}
    return dataclasses.replace(
        outcome,
        order=outcome.order[:count],
        losses=outcome.losses[:count],
        complete=True,
        prefixes=rows,
        rise=rise,
    )


def _sentence(rows: list[dict[str, Any]], most: float) -> str:
    least = min(rows, key=lambda row: row["most"] if math.isfinite(row["most"]) else math.inf)
    return (
        f"no plan of this search is within max_loss {most:g}: the smallest rise is {least['mean']:.4f} ± "
        f"{least['standard_error']:.4f} nats a token, {least['most']:.4f} with two standard errors, by layers "
        f"{words.layers(least['layers'])}; the search is kept: name another --max-loss with --resume"
    )


def _measured(job: Job, outcome: Outcome, most: float, with_maps: WithMaps) -> list[dict[str, Any]]:
    """Rows of the prefixes, fewest FLOPs first: up to the first that is within, and what was measured before."""
    kept = KeptRows(job.folder.path / PREFIXES, "measured plans")
    paths = [outcome.order[:count] for count in range(1, len(outcome.order) + 1)]
    costs = {len(path): _cost(job, path) for path in paths}
    rows: list[dict[str, Any]] = []
    over = False
    quiet = copy.copy(job)
    quiet.screen = SilentScreen()  # one bar at a time
    try:
        with job.screen.progress("plans on held-out windows", 1 + len(paths)) as advance:
            dense = _losses(quiet, [], kept, with_maps)
            for number, path in enumerate(sorted(paths, key=lambda path: (costs[len(path)], len(path))), 1):
                if over and _key(job, path) not in kept.known:
                    continue
                losses = _losses(quiet, path, kept, with_maps)
                row = {"layers": path, "flops": round(costs[len(path)], 6), **rise_of(dense, losses)}
                rows.append(row | {"window_losses": losses})
                over = over or is_within(row, most)
                advance(1 + number, f"{len(path)} layers: {row['mean']:+.4f} ± {row['standard_error']:.4f}")
    except KeyboardInterrupt:
        raise OrthoRankError(
            f"interrupted after {len(kept.known)} measured plans, the dense model among them; go on with the same "
            "command and --resume"
        ) from None
    return rows


def _cost(job: Job, layers: list[int]) -> float:
    """FLOPs of a prompt with these layers changed, as a share of the dense model's."""
    rank = job.settings.correct
    ranks = None if rank is None else dict.fromkeys(layers, rank)
    return 1 / flop_speedup(job.model.config, job.flop_tokens, layers, job.settings.keep_ratio, ranks=ranks)


def _key(job: Job, layers: list[int]) -> str:
    """By which a row is found: what a continued search has in common, and the layers."""
    identity = {name: value for name, value in job.identity.items() if name not in NEWER}
    about = json.dumps([identity, job.evaluator.batch_size, layers])
    return hashlib.sha256(about.encode()).hexdigest()[:24]


def _losses(job: Job, layers: list[int], kept: KeptRows, with_maps: WithMaps) -> list[float]:
    """Mean loss of each held-out window with these layers changed, and maps as the final plan has them."""

    def measure() -> dict[str, Any]:
        with apply(job.model, with_maps(job, plan_of(job, Outcome(layers)))) if layers else nullcontext():
            found = perplexity(job.model, job.calibration.held_out)
        return {"layers": layers, "losses": list(found.window_losses)}

    return [float(loss) for loss in kept.get(_key(job, layers), measure)["losses"]]
