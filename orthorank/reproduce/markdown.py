"""A reproduction as Markdown: tables with the paper's figures beside those measured here, and the verdicts."""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from pathlib import PurePath
from typing import Any

from orthorank.common.format import count
from orthorank.reproduce.paper import ABLATION_MODELS, MODELS

Column = tuple[str, Callable[[dict[str, Any]], str]]  # its head, and what it says of a row


def markdown(summary: dict[str, Any]) -> str:
    """All finished parts of ``summary``, for people."""
    model, where = summary["model"], PurePath(summary["model"]["name"])
    parts = [
        f"# The paper's tables on {where.name if where.is_absolute() else where}",
        f"{model['dtype']} on {model['device']}; {_sizes(summary)}. Beside each figure: the paper's, for its models "
        f"({', '.join(MODELS)}; in Table 3 {', '.join(ABLATION_MODELS)}; in Table 4 Llama-2-13B).",
    ]
    if "claims" in summary:
        layers = [claim for claim in summary["claims"] if claim["claim"].startswith("layer ")]
        parts += ["## Claims", _claims([claim for claim in summary["claims"] if claim not in layers])]
        if layers:
            parts += ["### Figure 4, layer by layer", _claims(layers)]
    for name, (title, drawn) in TABLES.items():
        if name in summary:
            parts += [f"## {title}", drawn(summary[name])]
    for key, figures in PICTURES.items():
        if key in summary:
            parts += [f"![{words}]({file}.png)" for file, words in figures]
    return "\n\n".join(parts) + "\n"


def titled(row: str) -> str:
    """A row's name as people write it; names that say no method are left as they are.

    >>> titled("sleb-20+orthorank"), titled("shortened-10"), titled("inverse")
    ('SLEB 20 % + OrthoRank', 'Shortened LLaMA 10 %', 'inverse')
    """
    method, _, ours = row.partition("+")
    name, _, percent = method.partition("-")
    if name not in METHODS:
        return row
    return f"{METHODS[name]} {percent} %" + (" + OrthoRank" if ours else "")


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(table(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    lines = [heads, ["---"] * len(heads), *rows]
    text = ["| " + " | ".join(line) + " |" if line[0] != "---" else "|" + "|".join(line) + "|" for line in lines]
    return "\n".join(text)


def _drawn(rows: Iterable[dict[str, Any]], *columns: Column) -> str:
    """A Markdown table: of each column its head, and what it says of a row."""
    return table([head for head, _ in columns], [[say(row) for _, say in columns] for row in rows])


def _texts(row: dict[str, Any]) -> list[Column]:
    """A column for each held-out text."""
    return [(f"perplexity, {text}", partial(_perplexity, text=text)) for text in row["perplexity"]]


def _claims(claims: list[dict[str, Any]]) -> str:
    return _drawn(
        claims,
        ("claim", itemgetter("claim")),
        ("where", itemgetter("where")),
        ("figure", lambda claim: "-" if claim["figure"] is None else f"{claim['figure']:.4g}"),
        ("in", itemgetter("unit")),
        ("threshold", lambda claim: f"{claim['threshold']:g}"),
        ("n", lambda claim: str(claim["n"])),
        ("standard error", lambda claim: "-" if claim["standard_error"] is None else f"{claim['standard_error']:.2g}"),
        ("verdict", lambda claim: f"**{claim['verdict']}**"),
        ("detail", itemgetter("detail")),
    )


def _main(part: dict[str, Any]) -> str:
    drawn = _drawn(
        part["rows"],
        NAME,
        LAYERS,
        LEFT_OUT,
        *_texts(part["rows"][0]),
        ("paper (C4)", lambda row: _list(row["paper_perplexity"])),
        ("throughput", lambda row: _speedup(row["throughput"])),
        ("tokens/s", lambda row: f"{row['throughput']['tokens_per_second']:,.0f}"),
        ("by FLOPs", lambda row: _times(row["throughput"]["flop_speedup"])),
        ("paper", lambda row: _times(row["paper_throughput"])),
    )
    return f"{drawn}\n\n{_how_timed(part['rows'][0]['throughput'])}"


def _speedup(speed: dict[str, Any]) -> str:
    return _times(speed["speedup"]) + (f" ± {speed['speedup_spread']:.2f}" if len(speed["seconds"]) > 1 else "")


def _times(factor: float | None) -> str:
    return "-" if factor is None else f"{factor:.2f}x"


def _how_timed(speed: dict[str, Any]) -> str:
    threads = f" with {count(speed['threads'], 'thread')}" if speed["device"] == "cpu" else ""
    return (
        f"Left out: share of all token updates. Throughput: prefill of a prompt of {speed['prompt']:,} tokens without "
        f"a cache, on {speed['device']}{threads}, by {speed['clock']}; median of the ratios to the dense model within "
        f"a round, ± half of the range between their quartiles, {len(speed['seconds'])} interleaved rounds. The "
        "paper's figures: one A6000, batch 32."
    )


def _share(row: dict[str, Any]) -> str:
    share = row.get("nominal_sparsity")
    return "-" if share is None else f"{100 * share:.1f} %"


def _accuracies(part: dict[str, Any]) -> str:
    measured = [row for row in part["rows"] if row.get("accuracy")]
    tasks = [task["task"] for task in measured[0]["accuracy"]["tasks"]] if measured else []
    rows = [
        [
            titled(row["row"]),
            *(f"{100 * t['value']:.1f} ± {100 * (t['standard_error'] or 0):.1f}" for t in row["accuracy"]["tasks"]),
            _mean(row["accuracy"]),
            _list(row["paper_accuracy"]),
        ]
        for row in measured
    ]
    if not measured:
        return "No tasks were named."
    counts = [f"{task['task']} ({task['rows']} rows, {task['metric']})" for task in measured[0]["accuracy"]["tasks"]]
    return table(["", *tasks, "mean", "paper"], rows) + f"\n\n± one standard error. {'; '.join(counts)}."


def _mean(accuracy: dict[str, Any]) -> str:
    """The mean over tasks, and its standard error as the tasks' own give it."""
    errors = [task["standard_error"] for task in accuracy["tasks"]]
    shown = f"{100 * accuracy['mean']:.2f}"
    if not errors or None in errors:
        return shown
    return f"{shown} ± {100 * math.hypot(*errors) / len(errors):.2f}"


def _ablation(part: dict[str, Any]) -> str:
    measured = [row for row in part["rows"] if "perplexity" in row]
    if not measured:
        return "This model has too few layers behind the sink."
    return _drawn(
        measured,
        NAME,
        LAYERS,
        LEFT_OUT,
        *_texts(measured[0]),
        ("paper", lambda row: _list(row.get("paper_perplexity", {}))),
        ACCURACY,
        ("paper", lambda row: _list(row["paper_accuracy"])),
    )


def _sweep(part: dict[str, Any]) -> str:
    if not part["points"]:
        return "No sparsity of the sweep can be reached with this model."
    return _drawn(
        part["points"],
        ("method", itemgetter("method")),
        ("sparsity", lambda point: f"{100 * point['sparsity']:.0f} %"),
        ("layers", lambda point: str(len(point["layers"]))),
        LEFT_OUT,
        FLOPS,
        *_texts(part["points"][0]),
    )


def _longbench(part: dict[str, Any]) -> str:
    counts = part["rows"][0]["scores"]["questions"]
    tasks = list(part["rows"][0]["scores"]["tasks"])
    rows = [
        [titled(row["row"]), *(f"{row['scores']['tasks'][task]:.1f}" for task in tasks), f"{row['scores']['mean']:.2f}"]
        for row in part["rows"]
    ]
    longest = f" with prompts up to {part['longest_prompt']:,} tokens" if part["longest_prompt"] else ""
    note = f"{part['questions']} questions of {part['data']}{longest}, so many of each task as its head says. "
    heads = ["", *(f"{task} ({counts[task]})" for task in tasks), "mean of tasks"]
    return table(heads, rows) + f"\n\n{note}Few questions say little: no standard error is claimed."


def _corrected(part: dict[str, Any]) -> str:
    if not part["rows"]:
        return "This model has too few layers."
    both = [
        (head, lambda row, say=say: f"{say(row)} ({say({'perplexity': row['plain_perplexity']})})")
        for head, say in _texts(part["rows"][0])
    ]
    drawn = _drawn(part["rows"], NAME, LAYERS, LEFT_OUT, FLOPS, *both, ACCURACY)
    note = f"Maps of rank {part['rows'][0]['rank']}, fitted to the windows of the searches"
    return f"{drawn}\n\n{note}; in parentheses without them. Not in the paper."


def _chosen(part: dict[str, Any]) -> str:
    return table(
        ["plan", "keep ratio", "layers"],
        [[titled(name), f"{row['keep_ratio']:.3g}", ", ".join(map(str, row["layers"]))] for name, row in part.items()],
    )


NAME: Column = ("", lambda row: titled(row["row"]))
LAYERS: Column = ("layers", lambda row: str(len(row["plan"]["layers"])) if row["plan"] else "0")
LEFT_OUT: Column = ("left out", _share)
FLOPS: Column = ("by FLOPs", lambda row: _times(row["flop_speedup"]))
ACCURACY: Column = ("accuracy", lambda row: _mean(row["accuracy"]) if row["accuracy"] else "-")
METHODS = {"sleb": "SLEB", "shortened": "Shortened LLaMA"}
PICTURES = {
    "similarities": (
        ("fig2-similarity-with-sink", "Figure 2: cosine of the sink with other tokens, by layer"),
        ("fig3-similarity-across-layers", "Figures 3 and 6: cosine of a state with itself in other layers"),
        ("fig7-similarity-of-tokens", "Figure 7: the sink and another token with the tokens after them"),
    ),
    "layerwise": (("fig4-layerwise-selection", "Figure 4: one layer selecting, orthogonal tokens or the others"),),
    "fig5": (("fig5-chosen-layers", "Figure 5: the chosen layers at 20 %"),),
}
TABLES = {
    "table1": ("Table 1: perplexity and throughput", _main),
    "table2": ("Table 2: zero-shot accuracy in per cent", _accuracies),
    "table3": ("Table 3: ablations at 20 %", _ablation),
    "table4": ("Table 4: share of layers x keep ratio, at 20 %", _ablation),
    "sweep": ("Perplexity over sparsity", _sweep),
    "longbench": ("LongBench", _longbench),
    "corrected": ("Beyond the paper: corrected plans", _corrected),
    "fig5": ("Figure 5: the chosen layers", _chosen),
}


def _perplexity(row: dict[str, Any], text: str) -> str:
    found = row["perplexity"][text]["perplexity"]
    return "infinite" if found is None else f"{found:.2f}"


def _list(known: dict[str, float]) -> str:
    return " / ".join(f"{value:g}" for value in known.values()) or "-"


def _sizes(summary: dict[str, Any]) -> str:
    sizes = summary["sizes"]
    held = "; ".join(f"{name}: {s['windows']} windows, {s['tokens']:,} tokens" for name, s in sizes["held_out"].items())
    calibration = sizes["calibration"]
    source = re.sub(r"\S*/", "", calibration["text"])  # the name of a file, not where it lies
    return f"calibrated on {calibration['windows']} windows, {calibration['tokens']:,} tokens of {source}; {held}"
