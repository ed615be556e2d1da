"""The demo's results in words: used by the terminal and by the page, so that both say the same."""

import math
from collections import Counter
from typing import Any

from orthorank.common.format import capital, figure, percent, ratio, spread

Results = dict[str, Any]

TITLES = {
    "dense": "dense",
    "layer-pruning": "layer pruning (SLEB)",
    "orthorank": "OrthoRank",
    "layer-pruning-corrected": "layer pruning, corrected",
    "orthorank-corrected": "OrthoRank, corrected",
}
MEASURED = 1.03  # a speed-up this many times the FLOPs' is above it by more than the kernels' differences explain
APART = 0.1  # the share by which rounds may differ without a remark
CORRECTED = "-corrected"  # ends the name of a row whose plan has maps


def row_of(results: Results, name: str) -> dict[str, Any] | None:
    """The row called ``name``, or None while it is not measured.

    >>> row_of({"rows": [{"name": "dense", "perplexity": 20.0}]}, "dense")["perplexity"]
    20.0
    """
    return next((row for row in results.get("rows", []) if row["name"] == name), None)


def verdict(results: Results) -> str:
    """The outcome in a few sentences; it says so where OrthoRank is the worse choice."""
    dense, pruned, ortho = (row_of(results, name) for name in ("dense", "layer-pruning", "orthorank"))
    if not (dense and ortho and dense.get("perplexity") and ortho.get("perplexity")):
        return "The run ended before perplexity was measured; what was found until then is below."
    sparsity = percent(ortho["nominal_sparsity"])
    times = ortho["perplexity"] / dense["perplexity"]
    sentences = [
        f"At {sparsity} sparsity OrthoRank has a perplexity of {figure(ortho['perplexity'])}, {times:.2f} times the "
        f"dense model's {figure(dense['perplexity'])}"
    ]
    if pruned and pruned.get("perplexity"):
        removed = f"{len(pruned['layers'])} layer{'s' if len(pruned['layers']) > 1 else ''} removed"
        other = percent(pruned["nominal_sparsity"])
        sentences[0] += f", and the model with {removed}{'' if other == sparsity else f' ({other})'} "
        sentences[0] += figure(pruned["perplexity"])
        sentences.append(_comparison(results, pruned, ortho))
    sentences += _corrected(results)
    if ortho.get("speedup"):
        sentences.append(
            f"Prefill runs {ortho['speedup']:.2f} times as fast as the dense model "
            f"(by FLOPs alone it would be {ortho['flop_speedup']:.2f} times)"
        )
        sentences += [capital(doubt.rstrip(".")) for doubt in doubts(results["rows"])]
    return ". ".join(sentences) + "."


def doubts(rows: list[dict[str, Any]], speedup: str = "speedup") -> list[str]:
    """What speaks against measured speed-ups: more than the FLOPs that are left out allow, or rounds far apart.

    Args:
        rows: with ``flop_speedup``, the figure ``speedup`` and its ``_spread``, half of the range between the quartiles
            of the rounds.

    >>> row = {"name": "a", "flop_speedup": 1.2, "speedup": 1.6, "speedup_spread": 0.02}
    >>> print(*doubts([row]))
    a: 1.60x is more than the 1.20x that its FLOPs allow, so something else disturbed the timing; time it again.
    >>> print(*doubts([row | {"speedup": 1.18, "speedup_spread": 0.1}]))
    a: the middle half of the rounds differs by 17 %, so 1.18x is not sure; time more rounds on an idle machine.
    """
    said = []
    for row in rows:
        value, bound, half = row.get(speedup), row.get("flop_speedup"), row.get(f"{speedup}_spread")
        if value is None:
            continue
        name, spread = TITLES.get(row["name"], row["name"]), half or 0.0
        if bound is not None and value > max(bound + spread, MEASURED * bound):
            said.append(
                f"{name}: {value:.2f}x is more than the {bound:.2f}x that its FLOPs allow, so something else disturbed "
                "the timing; time it again."
            )
        elif 2 * spread > APART * value:
            said.append(
                f"{name}: the middle half of the rounds differs by {200 * spread / value:.0f} %, so {value:.2f}x is "
                "not sure; time more rounds on an idle machine."
            )
    return said


def _corrected(results: Results) -> list[str]:
    """What is said of the rows with maps."""
    pruned, ortho = (row_of(results, name + CORRECTED) for name in ("layer-pruning", "orthorank"))
    if not (ortho and ortho.get("perplexity")):
        return []
    sentence = f"With maps that put back part of what is left out, OrthoRank has {figure(ortho['perplexity'])}"
    if not (pruned and pruned.get("perplexity")):
        return [sentence]
    return [f"{sentence}, layer pruning {figure(pruned['perplexity'])}", _comparison(results, pruned, ortho)]


def differences(results: Results) -> list[str]:
    """The rows against each other in nats a token, where the same windows say how sure that is.

    >>> pair = {"of": "orthorank", "against": "layer-pruning", "mean": -0.0312, "standard_error": 0.012}
    >>> differences({"quality": {"differences": [pair, pair | {"against": "dense"}]}})
    ['OrthoRank against layer pruning (SLEB): -0.031 ± 0.012']
    """
    found = results.get("quality", {}).get("differences", [])
    return [
        f"{TITLES[pair['of']]} against {TITLES[pair['against']]}: {nats(pair['mean'], pair['standard_error'])}"
        for pair in found
        if pair["against"] != "dense"  # those are in the table
    ]


def nats(mean: float | None, error: float | None) -> str:
    """A difference of two losses with its standard error; a dash when there is none.

    >>> nats(0.25, 0.0123), nats(-0.1, None), nats(None, None)
    ('+0.250 ± 0.012', '-0.100', '-')
    """
    if mean is None:
        return "-"
    return f"{mean:+.3f}" + ("" if error is None else f" ± {error:.3f}")


def compared(results: Results) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """Heads and rows of the table of how far plans are from the dense model, as `compare_plans` found it."""
    heads = ["next token KL", "answer KL", "rise of loss", "same answer"]
    rows = []
    for name, found in results["plans"].items():
        same = f"{found['same']} of {len(results['prompts'])}"
        kl = [spread(found["next_kl"], ".3f"), spread(found["answer_kl"], ".3f")]
        rows.append((name, [*kl, spread(found["rise"], "+.4f"), same]))
    return heads, rows


def changed(row: dict[str, Any]) -> str:
    """What the row's plan does to the model, for a column called "layers changed".

    >>> changed({"layers": [3, 5], "keep_ratio": 0.0}), changed({"layers": [3], "keep_ratio": 1 / 3})
    ('2 removed', '1 at 1/3')
    >>> changed({"layers": [3, 5, 6], "keep_ratio": 1 / 3, "keep_ratios": {"5": 0.0}})
    '2 at 1/3, 1 removed'
    """
    counts = Counter(ratio_of(row, layer) for layer in row["layers"])
    parts = [
        f"{count} {'removed' if share == 0 else 'at ' + ratio(share)}" for share, count in sorted(counts.items())[::-1]
    ]
    return ", ".join(parts) or "none"


def ratio_of(row: dict[str, Any], layer: int) -> float:
    """Share of the tokens that ``layer`` updates in a row's plan.

    >>> ratio_of({"layers": [3], "keep_ratio": 0.5}, 3), ratio_of({"layers": [3], "keep_ratio": 0.5}, 4)
    (0.5, 1.0)
    """
    if layer not in row["layers"]:
        return 1.0
    return float(row.get("keep_ratios", {}).get(str(layer), row["keep_ratio"]))


def plan_title(row: dict[str, Any]) -> str:
    """The row's name and what its plan does, as a title.

    >>> plan_title({"name": "orthorank", "layers": [3], "keep_ratio": 1 / 3})
    'OrthoRank: 1 layer updates 1/3 of the tokens'
    """
    one = len(row["layers"]) == 1
    count = f"{len(row['layers'])} {'layer' if one else 'layers'}"
    if row.get("keep_ratios"):
        return f"{TITLES[row['name']]}: {count} changed, {changed(row)}"
    if row["keep_ratio"] == 0:
        return f"{TITLES[row['name']]}: {count} removed"
    return f"{TITLES[row['name']]}: {count} update{'s' if one else ''} {ratio(row['keep_ratio'])} of the tokens"


def shown(key: str, value: float | None) -> str:
    """The figure ``key`` of a row as tables and pictures write it.

    >>> shown("speedup", 1.2345), shown("tokens_per_second", 543.21), shown("perplexity", None)
    ('1.23x', '543', '-')
    """
    if value is None:
        return "-"
    if key in ("speedup", "flop_speedup"):
        return f"{value:.2f}x"
    return f"{value:,.0f}" if key == "tokens_per_second" else figure(value)


def cells(row: dict[str, Any]) -> list[str]:
    """The row of the page's table: that of `quality_cells`, then tokens/s, speed-up and FLOP bound."""
    return [*quality_cells(row), *speed_cells(row)[1:]]


def quality_cells(row: dict[str, Any]) -> list[str]:
    """Name, layers changed, perplexity, and loss above the dense model's in nats a token.

    >>> quality_cells({"name": "dense", "layers": [], "keep_ratio": 1.0, "perplexity": 20.0, "above_dense": None})
    ['dense', 'none', '20.00', '-']
    """
    above = row.get("above_dense") or {}
    loss = nats(above.get("mean"), above.get("standard_error"))
    return [TITLES[row["name"]], changed(row), shown("perplexity", row.get("perplexity")), loss]


def speed_cells(row: dict[str, Any]) -> list[str]:
    """Name, tokens/s, speed-up with half of the range between its quartiles, FLOP bound.

    >>> speed_cells({"name": "dense", "tokens_per_second": 321.4, "speedup": 1.0, "flop_speedup": 1.0})
    ['dense', '321', '1.00x', '1.00x']
    """
    figures = [shown(key, row.get(key)) for key in ("tokens_per_second", "speedup", "flop_speedup")]
    if row.get("speedup_spread"):
        figures[1] += f" ± {row['speedup_spread']:.2f}"
    return [TITLES[row["name"]], *figures]


def _comparison(results: Results, pruned: dict[str, Any], ortho: dict[str, Any]) -> str:
    change = ortho["perplexity"] / pruned["perplexity"] - 1
    error = next(
        (
            pair["standard_error"]
            for pair in results.get("quality", {}).get("differences", [])
            if (pair["of"], pair["against"]) == (ortho["name"], pruned["name"])
        ),
        None,
    )
    sure = error is None or abs(math.log1p(change)) > 2 * error
    if abs(change) < 0.005 or not sure:
        return "On this text the two cannot be told apart"
    word = "lower" if change < 0 else "higher"
    return f"On this text OrthoRank's perplexity is {percent(abs(change))} {word} than layer pruning's"
