"""What the lines of a campaign come to: medians of forwards, rates beside their peers, counts of tests."""

import json
import statistics
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.campaign.lines import Line

EXPECTED = Path(__file__).with_name("expected.json")
OURS = "orthorank_kernels"


def steps(lines: Iterable[Line]) -> list[str]:
    """In the order of their first lines."""
    return list(dict.fromkeys(line["step"] for line in lines if "step" in line))


def times(lines: Iterable[Line], step: str | None = None) -> list[Line]:
    """Lines with a time; of a step. Of the same measurement made twice the later one counts."""
    found = {
        tuple(line.get(name) for name in ("step", "op", "shape", "provider", "mode")): line
        for line in lines
        if line.get("kind") == "time" and step in (None, line.get("step"))
    }
    return list(found.values())


def forwards(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """One row for each model, shape and variant of the prefill: medians, and the speed-up over dense, round by round.

    A round's time is the median of its forwards; a speed-up is the median over the rounds that dense has, too.
    """
    groups: dict[tuple[str, str, str, str], dict[int, list[Line]]] = {}
    for line in lines:
        if line.get("kind") == "forward":
            key = (line.get("campaign", ""), line["model"], line["shape"], line["variant"])
            groups.setdefault(key, {}).setdefault(line["round"], []).append(line)
    rows = []
    for (campaign, model, shape, variant), rounds in groups.items():
        own = {number: statistics.median(line["seconds"] for line in each) for number, each in rounds.items()}
        dense = {
            number: statistics.median(line["seconds"] for line in each)
            for number, each in groups.get((campaign, model, shape, "dense"), {}).items()
        }
        ratios = [dense[number] / seconds for number, seconds in own.items() if number in dense]
        every = [line for each in rounds.values() for line in each]
        seconds = statistics.median(line["seconds"] for line in every)
        rows.append(
            {
                "model": model,
                "shape": shape,
                "variant": variant,
                "rounds": len(own),
                "forwards": len(every),
                "seconds": seconds,
                "spread": spread([line["seconds"] for line in every]),
                "tokens_per_second": every[0]["tokens"] / seconds,
                "speedup": statistics.median(ratios) if ratios else None,
                "ideal": every[0]["ideal"],
                "peak_gb": max(line["peak_gb"] for line in every),
            }
        )
    return rows


def spread(values: list[float]) -> float:
    """The range between the quartiles, as a share of the median; 0 for a single value.

    >>> spread([1.0]), spread([1.0, 2.0, 3.0])
    (0.0, 0.5)
    """
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def ratios(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """Attention's rate over its peers' in the same run, and what was expected where there is an estimate."""
    found = [line for line in times(lines, "attention") if line["mode"] == "replay"]
    by_shape: dict[str, list[Line]] = {}
    for line in found:
        by_shape.setdefault(line["shape"], []).append(line)
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))["attention"]
    rows = []
    for shape, each in by_shape.items():
        for ours in (line for line in each if line["provider"].startswith(OURS)):
            for peer in (line for line in each if not line["provider"].startswith(OURS)):
                known = next(
                    (e for e in expected
                     if (f"{e['tokens']}, {e['heads']}", e["peer"]) == (shape, peer["provider"])), {}
                )  # fmt: skip
                rows.append(
                    {
                        "shape": shape,
                        "ours": ours["provider"],
                        "peer": peer["provider"],
                        "rate": ours["rate"] / peer["rate"],
                        "time": peer["median_us"] / ours["median_us"],
                        "model": known.get("model"),
                        "target": known.get("target"),
                    }
                )
    return rows


def expected_share(op: str) -> dict[str, float]:
    """What is expected of an op as a share of the copy rate; empty without an estimate."""
    known = json.loads(EXPECTED.read_text(encoding="utf-8"))["of_copy_rate"]
    return next((entry for entry in known if entry["op"] == op), {})


def outcomes(lines: Iterable[Line], step: str) -> Counter[str]:
    """How many checks and tests of a step ended how."""
    return Counter(
        line.get("status", "ok")
        for line in lines
        if line.get("step") == step and line.get("kind") in ("check", "test") and line.get("test") != "all"
    )


def troubles(lines: Iterable[Line]) -> list[Line]:
    """Everything that was not measured, or not right, or done otherwise."""
    return [line for line in lines if line.get("status", "ok") not in ("ok", "passed", "skipped")]
