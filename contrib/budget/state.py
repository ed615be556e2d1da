"""How far a budget search is: every loss it has seen, as a file from which it goes on.

A search is a function of the losses it asks for. To go on, it begins anew and takes from the file what it knows
already, so that it comes by the same way to the same result, bit for bit.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from contrib.budget.pareto import Point
from contrib.budget.plans import Key, Plan, Space, key_of
from orthorank.common.errors import OrthoRankError, shown
from orthorank.common.files import read_json, write_text

SCHEMA = 1


class PlanLoss(Protocol):
    """What a budget search asks for: the calibration loss of a mixed plan."""

    @property
    def fingerprint(self) -> Any:
        """What the losses depend on, as JSON stores it: the same model, text and windows give the same one."""

    def loss(self, plan: Plan, limit: float = math.inf) -> float:
        """Mean loss in nats, always the same bits; inf if it is not finite, and perhaps if it is above ``limit``."""

    def scout(self, plan: Plan) -> float:
        """A cheap estimate of the loss, such as that on a few of the windows; NaN or inf if it is not finite."""

    def follow(self, plan: Plan) -> None:
        """The next plans differ from ``plan`` by little."""


@dataclass
class Seen:
    """What is known of one plan.

    Args:
        loss: on all windows; None: not known. above: the loss is above this, or (inf) it is not finite.
        scouted: the cheap estimate, None: not made.
    """

    loss: float | None = None
    above: float = -math.inf
    scouted: float | None = None

    def answer(self, limit: float) -> float | None:
        """The loss as `PlanLoss.loss` gives it for ``limit``; None: it has to be asked for.

        >>> Seen(loss=2.0).answer(1.5), Seen(above=1.0).answer(1.5), Seen(above=1.5).answer(1.5)
        (inf, None, inf)
        """
        if self.loss is not None:
            return self.loss if self.loss <= limit else math.inf
        return math.inf if self.above >= limit else None

    def learn(self, loss: float, limit: float) -> None:
        """`PlanLoss.loss` gave ``loss`` for ``limit``."""
        if math.isfinite(loss):
            self.loss = loss
        else:
            self.above = max(self.above, limit)


@dataclass
class BudgetState:
    """All that a search has seen.

    Args:
        settings: what it was called with; a search goes on with the same ones only.
        seen: by plan, in the order in which they came up. origins: names of given plans.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    seen: dict[Key, Seen] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    @property
    def evaluations(self) -> int:
        """Plans that were looked at on all windows, or on as many as it took to give them up."""
        return sum(seen.loss is not None or seen.above > -math.inf for seen in self.seen.values())

    def points(self, space: Space) -> list[Point]:
        """Every plan whose loss is known, with its cost, in the order in which they came up."""
        return [
            Point(space.cost(dict(key)), seen.loss, dict(key), self.origins.get(key, ""))
            for key, seen in self.seen.items()
            if seen.loss is not None
        ]

    def save(self, path: Path) -> None:
        """Write the state as JSON, replacing the file in one step."""
        seen = [[[list(pair) for pair in key], *_written(value)] for key, value in self.seen.items()]
        origins = [[[list(pair) for pair in key], name] for key, name in self.origins.items()]
        whole = {"schema": SCHEMA, "search": "budget", "settings": self.settings, "seen": seen, "origins": origins}
        write_text(path, json.dumps(whole, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> "BudgetState":
        """Read a saved state.

        Raises:
            OrthoRankError: no such file, or it is not the state of a budget search.
        """
        try:
            values = read_json(Path(path))
            if values["search"] != "budget" or not isinstance(values["settings"], dict):
                raise ValueError
            if type(schema := values["schema"]) is not int:
                raise ValueError
            if schema != SCHEMA:
                raise OrthoRankError(
                    f"{path} has schema {shown(schema)} and this version reads {SCHEMA}; go on with the version that "
                    "wrote it, or delete it to begin anew"
                )
            seen = {_key(key): _read(*rest) for key, *rest in values["seen"]}
            origins = {_key(key): str(name) for key, name in values["origins"]}
        except OrthoRankError:
            raise
        except OSError as error:
            raise OrthoRankError(f"no search state can be read at {path}: {error.strerror}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise OrthoRankError(
                f"{path} is not the state of a budget search (schema {SCHEMA}); delete it to begin anew"
            ) from error
        return cls(values["settings"], seen, origins)

    def check(self, settings: Mapping[str, Any]) -> None:
        """The state is of a search with ``settings``.

        Raises:
            OrthoRankError: naming what differs, what it was and what it is.
        """
        for name in sorted({*self.settings, *settings}):
            before, now = self.settings.get(name), settings.get(name)
            if before != now:
                raise OrthoRankError(
                    f"state is of another search: its {name} is {_short(before)} and this search's is {_short(now)}; "
                    "search with the same model, text and options, or begin anew without a state"
                )


class BudgetInterrupted(KeyboardInterrupt):
    """Ctrl-C during a budget search. ``state`` holds what was found until then; pass it on to continue."""

    def __init__(self, state: BudgetState) -> None:
        super().__init__(f"interrupted after {state.evaluations} evaluations")
        self.state = state


class Ledger:
    """Asks for losses, and keeps what was answered: in the state for another time, and for the search itself.

    ``known`` is what this search has asked for so far. The state may know more, from a search that was further; a
    decision that looked there would not be the same as in that search.
    """

    def __init__(self, losses: PlanLoss, state: BudgetState) -> None:
        self.losses, self.state = losses, state
        self.known: dict[Key, Seen] = {}
        self.asked = 0
        self.fresh = False  # whether the last answer was not in the state

    def loss(self, plan: Plan, limit: float = math.inf) -> float:
        """The loss of ``plan``; inf if and only if it is above ``limit`` or not finite, by any process's figure."""
        key = key_of(plan)
        stored = self.state.seen.setdefault(key, Seen())
        self.fresh = stored.answer(limit) is None
        if self.fresh:
            stored.learn(self.losses.loss(dict(key), limit), limit)
        loss = stored.answer(limit)
        assert loss is not None
        self.known.setdefault(key, Seen()).learn(loss, limit)
        self.asked += 1
        return loss

    def scout(self, plan: Plan) -> float:
        """As `PlanLoss.scout`."""
        key = key_of(plan)
        stored = self.state.seen.setdefault(key, Seen())
        self.fresh = stored.scouted is None
        if stored.scouted is None:
            scouted = self.losses.scout(dict(key))
            stored.scouted = scouted if math.isfinite(scouted) else math.inf
        self.asked += 1
        return stored.scouted

    def hopeless(self, plan: Plan, limit: float) -> bool:
        """Whether this search knows already that ``plan`` is not below ``limit``."""
        seen = self.known.get(key_of(plan))
        return seen is not None and (seen.above >= limit or (seen.loss is not None and seen.loss >= limit))

    def best(self, space: Space, most: float) -> tuple[float, dict[int, float]] | None:
        """The least loss that this search knows at a cost of ``most`` or less, and its plan."""
        found = [
            (seen.loss, space.cost(dict(key)), key)
            for key, seen in self.known.items()
            if seen.loss is not None and space.cost(dict(key)) <= most
        ]
        if not found:
            return None
        loss, _, key = min(found)
        return loss, dict(key)


def _written(seen: Seen) -> list[Any]:
    above: float | str | None = seen.above if math.isfinite(seen.above) else ("inf" if seen.above > 0 else None)
    scouted: float | str | None = seen.scouted if seen.scouted is None or math.isfinite(seen.scouted) else "inf"
    return [seen.loss, above, scouted]


def _read(loss: Any, above: Any, scouted: Any) -> Seen:
    if loss is not None and not math.isfinite(loss):
        raise ValueError
    return Seen(
        None if loss is None else float(loss),
        -math.inf if above is None else float(above),
        None if scouted is None else float(scouted),
    )


def _key(pairs: Any) -> Key:
    return tuple((int(layer), float(ratio)) for layer, ratio in pairs)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else f"{words[:77]}..."
