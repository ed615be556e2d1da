"""A reproduction as Markdown: tables with the paper's figures beside those measured here, and the verdicts."""

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(summary: dict[str, Any]) -> str:
    """All finished parts of ``summary``, for people."""
    model = summary["model"]
    parts = [
        f"# The paper's tables on {model['name']}",
        f"{model['dtype']} on {model['device']}; {_sizes(summary)}. Beside each figure: the paper's, for its models "
        f"({_models(summary)}).",
    ]
    if "claims" in summary:
        parts += ["## Claims", _claims(summary["claims"])]
    for name, title in TITLES.items():
        if name in summary:
            parts += [f"## {title}", TABLES[name](summary[name])]
    return "\n\n".join(parts) + "\n"


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


def _claims(claims: list[dict[str, Any]]) -> str:
    rows = [
        [
            claim["claim"],
            claim["where"],
            f"{claim['figure']:.4g}" if claim["figure"] is not None else "-",
            f"{claim['threshold']:g}",
            str(claim["n"]),
            "-" if claim["standard_error"] is None else f"{claim['standard_error']:.2g}",
            f"**{claim['verdict']}**",
            claim["detail"],
        ]
        for claim in claims
    ]
    heads = ["claim", "where", "figure", "above", "n", "standard error", "verdict", "detail"]
    return table(heads, rows)


def _main(part: dict[str, Any]) -> str:
    texts = list(part["rows"][0]["perplexity"])
    heads = ["", *(f"perplexity, {text}" for text in texts), "paper (C4)", "throughput", "by FLOPs", "paper"]
    rows = []
    for row in part["rows"]:
        speed, ideal = row["throughput"], row["throughput"]["flop_speedup"]
        rows.append(
            [
                row["row"],
                *(_perplexity(row["perplexity"][text]) for text in texts),
                _list(row["paper_perplexity"]),
                f"{speed['speedup']:.2f}x",
                "-" if ideal is None else f"{ideal:.2f}x",
                "-" if row["paper_throughput"] is None else f"{row['paper_throughput']:.2f}x",
            ]
        )
    return table(heads, rows)


def _accuracies(part: dict[str, Any]) -> str:
    measured = [row for row in part["rows"] if row.get("accuracy")]
    tasks = [task["task"] for task in measured[0]["accuracy"]["tasks"]] if measured else []
    rows = [
        [
            row["row"],
            *(f"{100 * t['value']:.1f} ± {100 * (t['standard_error'] or 0):.1f}" for t in row["accuracy"]["tasks"]),
            f"{100 * row['accuracy']['mean']:.2f}",
            _list(row["paper_accuracy"]),
        ]
        for row in measured
    ]
    return table(["", *tasks, "mean", "paper"], rows)


def _ablation(part: dict[str, Any]) -> str:
    measured = [row for row in part["rows"] if "perplexity" in row]
    if not measured:
        return "This model has too few layers behind the sink."
    texts = list(measured[0]["perplexity"])
    heads = ["", *(f"perplexity, {text}" for text in texts), "paper", "accuracy", "paper"]
    rows = [
        [
            row["row"],
            *(_perplexity(row["perplexity"][text]) for text in texts),
            _list(row.get("paper_perplexity", {})),
            "-" if not row["accuracy"] else f"{100 * row['accuracy']['mean']:.2f}",
            _list(row["paper_accuracy"]),
        ]
        for row in measured
    ]
    return table(heads, rows)


def _sweep(part: dict[str, Any]) -> str:
    if not part["points"]:
        return "No sparsity of the sweep can be reached with this model."
    texts = list(part["points"][0]["perplexity"])
    rows = [
        [
            point["method"],
            f"{100 * point['sparsity']:.0f} %",
            str(len(point["layers"])),
            "-" if point["flop_speedup"] is None else f"{point['flop_speedup']:.2f}x",
            *(_perplexity(point["perplexity"][text]) for text in texts),
        ]
        for point in part["points"]
    ]
    return table(["method", "sparsity", "layers", "by FLOPs", *(f"perplexity, {text}" for text in texts)], rows)


def _longbench(part: dict[str, Any]) -> str:
    tasks = list(part["rows"][0]["scores"]["tasks"])
    rows = [
        [row["row"], *(f"{row['scores']['tasks'][task]:.1f}" for task in tasks), f"{row['scores']['mean']:.2f}"]
        for row in part["rows"]
    ]
    return table(["", *tasks, "mean"], rows)


def _chosen(part: dict[str, Any]) -> str:
    return table(
        ["plan", "keep ratio", "layers"],
        [[name, f"{row['keep_ratio']:.3g}", ", ".join(map(str, row["layers"]))] for name, row in part.items()],
    )


TITLES = {
    "table1": "Table 1: perplexity and throughput",
    "table2": "Table 2: zero-shot accuracy in per cent",
    "table3": "Table 3: ablations at 20 %",
    "table4": "Table 4: share of layers x keep ratio, at 20 %",
    "sweep": "Perplexity over sparsity",
    "longbench": "LongBench",
    "fig5": "Figure 5: the chosen layers",
}
TABLES = {
    "table1": _main,
    "table2": _accuracies,
    "table3": _ablation,
    "table4": _ablation,
    "sweep": _sweep,
    "longbench": _longbench,
    "fig5": _chosen,
}


def _perplexity(found: dict[str, Any]) -> str:
    return f"{found['perplexity']:.2f}" if found["perplexity"] is not None else "infinite"


def _list(known: dict[str, float]) -> str:
    return " / ".join(f"{value:g}" for value in known.values()) or "-"


def _models(summary: dict[str, Any]) -> str:
    from orthorank.reproduce.paper import ABLATION_MODELS, MODELS

    return f"{', '.join(MODELS)}; in Table 3 {', '.join(ABLATION_MODELS)}; in Table 4 Llama-2-13B"


def _sizes(summary: dict[str, Any]) -> str:
    sizes = summary["sizes"]
    held = "; ".join(f"{name}: {s['windows']} windows, {s['tokens']:,} tokens" for name, s in sizes["held_out"].items())
    calibration = sizes["calibration"]
    return f"calibrated on {calibration['tokens']:,} tokens of {calibration['text']}; {held}"
