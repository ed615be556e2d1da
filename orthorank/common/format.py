"""Figures in words, as all tables and sentences write them."""

import statistics
from typing import Any


def percent(share: float) -> str:
    """A share in per cent, without a superfluous decimal.

    >>> percent(0.2), percent(0.125)
    ('20 %', '12.5 %')
    """
    return f"{round(100 * share, 1):g} %"


def ratio(value: float) -> str:
    """A keep ratio as people write it.

    >>> ratio(1 / 3), ratio(0.25), ratio(0.0)
    ('1/3', '0.25', '0')
    """
    return "1/3" if abs(value - 1 / 3) < 1e-3 else f"{value:g}"


def duration(seconds: float) -> str:
    """A time, rounded to what a reader needs.

    >>> duration(0.4), duration(95), duration(240), duration(9000)
    ('1 s', '95 s', '4 min', '2.5 h')
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def layers(numbers: list[int]) -> str:
    """Layer numbers with runs drawn together.

    >>> layers([12, 14, 15, 16, 20, 21])
    '12, 14-16, 20, 21'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or "none"


def sink_sentence(sink: dict[str, Any]) -> str:
    """What the sink looks like, with the few numbers that say it."""
    return capital(sink["reason"]) + "."


def sink_figures(sink: dict[str, Any]) -> list[str]:
    """The sink in a few lines: norms before and after it forms, cosines with itself and with the others."""
    at, ratios = sink.get("sink_layer"), sink["ratios"]
    begin = "that begin with BOS" if sink.get("bos") else "with different first tokens"
    counted = f"measured on {sink['first_tokens']} passages of {sink['tokens']} tokens {begin}"
    if at is None:
        return [f"Largest norm of the first token: {max(ratios):.3g} times that of the others; {counted}."]
    after = slice(at + 1, None)
    own, others = sink["sink_norms"], sink["other_norms"]
    return [
        f"Norm of the first token's state: {own[at]:,.3g} before the layer and {own[at + 1]:,.0f} after it; of the "
        f"others: {others[at]:,.3g} and {others[at + 1]:,.3g}; {counted}.",
        f"Cosine of its normalised state from layer to layer: {_span(sink['cos_self'][after])} over all later layers.",
        f"Cosine with the other tokens: {sink['cos_others'][after][0]:.3f} in the first layer after it, "
        f"{max(sink['cos_others'][after]):.3f} at most.",
    ]


def spread(figure: dict[str, Any], form: str = ".4f") -> str:
    """A mean with its standard error, where there is one.

    >>> spread({"mean": 0.25, "standard_error": 0.01}, "+.2f"), spread({"mean": 0.25, "standard_error": float("nan")})
    ('+0.25 ± 0.01', '0.2500')
    """
    error = figure["standard_error"]
    return f"{figure['mean']:{form}}" + (f" ± {error:{form.lstrip('+')}}" if error == error else "")


def figure(value: float | None) -> str:
    """A number with four significant digits, at least to the unit; a dash when there is none.

    >>> figure(21.153), figure(1234.4), figure(None)
    ('21.15', '1,234', '-')
    """
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def count(number: int, thing: str) -> str:
    """How many of a thing.

    >>> count(1, "round"), count(3, "round")
    ('1 round', '3 rounds')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def capital(sentence: str) -> str:
    """``sentence`` with a capital first letter."""
    return sentence[:1].upper() + sentence[1:]


def _span(values: list[float]) -> str:
    if not values:
        return "not measured"
    return f"{min(values):.3f} to {max(values):.3f}, median {statistics.median_high(values):.3f}"
