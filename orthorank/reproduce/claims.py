"""What the paper claims, held against what was measured: a figure, a threshold, n, a standard error and a verdict."""

import dataclasses
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orthorank.common.paired import SIGMAS, paired

HOLDS, FAILS, UNDECIDED = "holds", "fails", "undecided"


@dataclass(frozen=True)
class Claim:
    """One claim and its verdict.

    Args:
        claim: what the paper says. where: its place there.
        figure: what was measured: it must be above ``threshold`` for the claim to hold.
        n: how many measurements are behind the figure; standard_error: of the figure over these, None where the
            figure has none.
        unit: of figure, threshold and standard error.
        verdict: ``"holds"``, ``"fails"``, or ``"undecided"``: the figure is within two standard errors.
        detail: the numbers behind it, in words.
    """

    claim: str
    where: str
    figure: float
    threshold: float
    n: int
    standard_error: float | None
    verdict: str
    detail: str
    unit: str = "nats per token"

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON stores them."""
        return dataclasses.asdict(self)


def judge(figure: float, threshold: float, standard_error: float | None) -> str:
    """Above the threshold by two standard errors holds, below it by as much fails, anything between is undecided.

    >>> judge(0.3, 0.0, 0.1), judge(-0.3, 0.0, 0.1), judge(0.1, 0.0, 0.1), judge(0.9, 0.8, None)
    ('holds', 'fails', 'undecided', 'holds')
    """
    if math.isnan(figure) or (standard_error is not None and math.isnan(standard_error)):
        return UNDECIDED
    room = SIGMAS * (standard_error or 0.0)
    if figure - threshold > room:
        return HOLDS
    return FAILS if figure - threshold < -room else UNDECIDED


def turning_to_the_sink(similarities: dict[str, Any], sink_layer: int | None) -> Claim:
    """Observation 1: from the layer after the sink to the last one, other tokens turn towards the sink."""
    first = 0 if sink_layer is None else sink_layer + 1
    means = [statistics.fmean(row) for row in similarities["sink_with"]]
    errors = similarities["sink_with_error"]
    figure, error = means[-1] - means[first], math.hypot(errors[-1] or math.nan, errors[first] or math.nan)
    return Claim(
        "the cosine of other tokens with the sink is higher in the last layer than right after the sink forms",
        "section 2, Observation 1, Figure 2",
        figure,
        0.0,
        similarities["passages"],
        error,
        judge(figure, 0.0, error) if sink_layer is not None else UNDECIDED,
        f"{means[first]:.3f} in layer {first}, {means[-1]:.3f} in layer {len(means) - 1}",
        "cosine",
    )


def still_sink(similarities: dict[str, Any], sink_layer: int | None) -> Claim:
    """Observation 2: after the sink forms its normalised state hardly moves, unlike another token's."""
    first = 0 if sink_layer is None else sink_layer + 1
    own, other = (_mean_of_pairs(similarities[name], first) for name in ("sink_across", "other_across"))
    pairs = math.comb(len(similarities["sink_across"]) - first, 2)
    return Claim(
        "the sink's normalised state is nearly the same in all layers after it forms (mean cosine of two of them)",
        "section 2, Observation 2, Figure 3",
        own,
        0.8,
        pairs,
        None,
        judge(own, 0.8, None) if sink_layer is not None and pairs else UNDECIDED,
        f"{own:.3f} over {pairs} pairs of layers; token {similarities['other']}: {other:.3f}",
        "cosine",
    )


def layer_by_layer(compared: list[dict[str, Any]]) -> list[Claim]:
    """Figure 4: in every layer after the sink but the last, the orthogonal tokens are the better choice."""
    single = [
        Claim(
            f"layer {one['layer']}: selecting orthogonal tokens has a lower loss than selecting the others",
            "section 3.1, Figure 4",
            one["margin"],
            0.0,
            len(one["losses"]),
            one["standard_error"],
            judge(one["margin"], 0.0, _number(one["standard_error"])),
            f"perplexity {one['perplexities'][0]:.2f} against {one['perplexities'][1]:.2f}",
        )
        for one in compared
    ]
    inner = single[:-1]
    better = sum(claim.figure > 0 for claim in inner)
    if any(claim.verdict == FAILS for claim in inner):
        verdict = FAILS
    else:
        verdict = HOLDS if inner and better == len(inner) else UNDECIDED
    share = better / len(inner) if inner else math.nan
    whole = Claim(
        "selecting orthogonal tokens is better in every layer after the sink but the last",
        "section 3.1, Figure 4",
        share,
        1.0,
        len(inner),
        None,
        verdict,
        f"better in {better} of {len(inner)} layers; "
        f"beyond two standard errors in {sum(c.verdict == HOLDS for c in inner)}, worse by as much in "
        f"{sum(c.verdict == FAILS for c in inner)}",
        "share of layers",
    )
    return [whole, *single]


def lower_loss(claim: str, where: str, better: dict[str, Any], worse: dict[str, Any], text: str) -> Claim:
    """A claim that one plan has a lower loss than another, on the same windows of a text."""
    figure, error = paired(better["window_losses"], worse["window_losses"])
    return Claim(
        f"{claim} ({text})",
        where,
        figure,
        0.0,
        len(better["window_losses"]),
        error,
        judge(figure, 0.0, error),
        f"perplexity {better['perplexity']:.2f} against {worse['perplexity']:.2f}",
    )


def check_claims(summary: dict[str, Any]) -> list[Claim]:
    """Every claim that the finished parts of a reproduction speak to."""
    claims: list[Claim] = []
    sink_layer = summary.get("sink", {}).get("sink_layer")
    if (similarities := summary.get("similarities")) is not None:
        claims += [turning_to_the_sink(similarities, sink_layer), still_sink(similarities, sink_layer)]
    if (compared := summary.get("layerwise")) is not None:
        claims += layer_by_layer(compared)
    rows = {row["row"]: row for row in summary.get("table1", {}).get("rows", [])}
    for percent in (10, 20):
        if (ours := f"sleb-{percent}+orthorank") in rows and (theirs := f"sleb-{percent}") in rows:
            claims += _on_every_text(
                f"at {percent} % sparsity SLEB + OrthoRank has a lower perplexity than SLEB",
                "Table 1",
                rows[ours],
                rows[theirs],
            )
    ablation = {row["row"]: row for row in summary.get("table3", {}).get("rows", [])}
    for words, ours, theirs in (
        ("orthogonal tokens are a better choice than random ones", "full", "random"),
        ("random tokens are a better choice than the least orthogonal ones", "random", "inverse"),
        ("keys and values of all tokens are better than those of the selected ones alone", "full", "selected-kv"),
    ):
        if ours in ablation and theirs in ablation:
            claims += _on_every_text(words, "Table 3", ablation[ours], ablation[theirs])
    return claims


def _on_every_text(claim: str, where: str, better: dict[str, Any], worse: dict[str, Any]) -> Iterable[Claim]:
    return [
        dataclasses.replace(found, detail=f"{found.detail}{_sizes(better, worse)}")
        for text in better["perplexity"]
        for found in [lower_loss(claim, where, better["perplexity"][text], worse["perplexity"][text], text)]
    ]


def _sizes(better: dict[str, Any], worse: dict[str, Any]) -> str:
    """What the two plans really leave out, where layers, which are whole, make that differ."""
    ours, theirs = (_number(row.get("nominal_sparsity")) for row in (better, worse))
    if not abs(ours - theirs) >= 5e-4:
        return ""
    return f"; {100 * ours:.1f} % of the updates left out against {100 * theirs:.1f} %"


def _mean_of_pairs(matrix: list[list[float]], first: int) -> float:
    values = [matrix[i][j] for i in range(first, len(matrix)) for j in range(i + 1, len(matrix))]
    return statistics.fmean(values) if values else math.nan


def _number(value: float | None) -> float:
    """JSON has null where there is no figure."""
    return math.nan if value is None else value
