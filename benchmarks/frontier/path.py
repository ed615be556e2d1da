"""A path of plans from the dense model down to few FLOPs: one change a round, the one that costs least loss a FLOP."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from orthorank import OrthoRankError
from orthorank.common.files import write_text
from orthorank.stack.evaluator import Evaluator

Change = tuple[int, float]  # a layer, and the ratio that it gets
LEAST_SEEN = 4  # changes of a round that see all windows


@dataclass
class Path_:
    """How far the search is; saved after each evaluation.

    Args:
        fingerprint: of windows, fit and settings. changes: made so far, in order.
        losses: on all windows: of the dense model, then after each change. flops: the same, as shares of the dense
            model's.
        sums: of the running round, by change (``"layer ratio"``): losses of the windows seen so far.
        resting: changes that sit out the running round: the worse half of those before, on the first windows.
    """

    fingerprint: str
    changes: list[Change] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    sums: dict[str, list[float]] = field(default_factory=dict)
    base: list[float] = field(default_factory=list)
    resting: list[str] = field(default_factory=list)

    def plan(self, rounds: int | None = None) -> dict[int, float]:
        """The ratios after ``rounds`` changes."""
        return dict(self.changes[:rounds])

    def save(self, file: Path) -> None:
        write_text(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path, fingerprint: str) -> "Path_":
        if not file.exists():
            return cls(fingerprint)
        found = cls(**json.loads(file.read_text(encoding="utf-8")))
        found.changes = [(layer, ratio) for layer, ratio in found.changes]
        if found.fingerprint != fingerprint:
            raise OrthoRankError(f"{file} is of other windows or settings; delete it to begin anew")
        return found


def lay(
    evaluator: Evaluator,
    path: Path_,
    ratios: dict[int, list[float]],
    flops: Callable[[dict[int, float]], float],
    *,
    until: float,
    first: int,
    file: Path,
    say: Callable[[str], None],
) -> None:
    """Change one layer after the other until a plan has at most ``until`` of the dense model's FLOPs.

    Every change sees the first windows; the best quarter of them sees all. The next round leaves out the worse half.

    Args:
        ratios: what each layer may become, in any order.
        flops: of a plan, as a share of the dense model's. first: windows that all changes see.
    """
    windows = evaluator.windows
    if not path.losses:
        path.base = evaluator.window_losses({}, range(windows)) or []
        path.losses, path.flops = [sum(path.base) / evaluator.predictions], [1.0]
    while path.flops[-1] > until:
        plan = path.plan()
        evaluator.start(plan, ratios)
        open_ = [(layer, ratio) for layer, list_ in ratios.items() for ratio in list_ if ratio < plan.get(layer, 1.0)]
        if not open_:
            return
        saved = {change: path.flops[-1] - flops(plan | {change[0]: change[1]}) for change in open_}
        entrants = [change for change in open_ if _name(change) not in path.resting] or open_

        def price(change: Change, seen: int, saved: dict[Change, float] = saved) -> float:
            return (sum(path.sums[_name(change)][:seen]) - sum(path.base[:seen])) / saved[change]

        def see(change: Change, until_window: int, plan: dict[int, float] = plan) -> None:
            have = path.sums.get(_name(change), [])
            if len(have) < until_window:
                new = evaluator.window_losses(plan | {change[0]: change[1]}, range(len(have), until_window))
                assert new is not None  # no limit was given
                path.sums[_name(change)] = have + new
                path.save(file)

        for change in entrants:
            see(change, first)
        ranked = sorted(entrants, key=lambda change: (price(change, first), change))
        finalists = ranked[: max(LEAST_SEEN, -(-len(ranked) // 4))]
        for change in finalists:
            see(change, windows)
        best = min(finalists, key=lambda change: (price(change, windows), change))
        path.resting = [_name(change) for change in ranked[-(len(ranked) // 2) :]] if len(ranked) > LEAST_SEEN else []
        path.base, path.sums = path.sums[_name(best)], {}
        path.changes.append(best)
        path.losses.append(sum(path.base) / evaluator.predictions)
        path.flops.append(flops(path.plan()))
        path.save(file)
        say(f"{len(path.changes):3} {_name(best):>10}: loss {path.losses[-1]:.4f}, FLOPs {path.flops[-1]:.3f}")


def at_level(path: Path_, level: float) -> int | None:
    """After how many changes a path comes to ``level`` of the FLOPs or less; None: it does not."""
    return next((rounds for rounds, share in enumerate(path.flops) if share <= level), None)


def _name(change: Change) -> str:
    return f"{change[0]} {change[1]:.4g}"
