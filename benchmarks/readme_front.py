"""What a reader sees first: the frontier of quality and FLOPs, who is ahead on it, and the paper's own figures."""

from typing import Any

from benchmarks.readme_docs import load, table

KINDS = {"": "", "corrected": ", corrected", "distilled": ", distilled"}
METHODS = {"removed": "layers removed (SLEB)", "selected": "OrthoRank", "mixed": "some removed, some select"}
LEVELS = (0.92, 0.82)
TEXTS = ("WikiText-2", "C4", "speeches")
PAPER = ("Llama-3-8B", "Mistral-7B")
PAPER_ROWS = {
    "dense": "dense",
    "sleb-10": "layers removed (SLEB), 10 %",
    "sleb-10+orthorank": "OrthoRank, 10 %",
    "sleb-20": "layers removed (SLEB), 20 %",
    "sleb-20+orthorank": "OrthoRank, 20 %",
}


def title(method: str) -> str:
    """Of a method such as ``"removed,corrected"``."""
    name, _, kind = method.partition(",")
    return METHODS[name] + KINDS[kind]


def front_section() -> str:
    """The frontier at two shares of the FLOPs, and a sentence on who is ahead."""
    found = load("frontier_smollm2.json")
    dense, *rows = found["rows"]
    texts = [text for text in TEXTS if text in dense["perplexity"]]
    lines = [["dense", "", "1.000", *(f"{dense['perplexity'][text]:.1f}" for text in texts)]]
    for level in LEVELS:
        for row in sorted((r for r in rows if r["level"] == level), key=lambda r: -r["perplexity"][texts[0]]):
            cells = [f"{row['perplexity'][text]:.1f}" for text in texts]
            lines.append([title(row["method"]), _layers(row["plan"]), f"{row['flops']:.3f}", *cells])
    note = (
        "From `python benchmarks/bench_frontier.py --kept --json benchmarks/results/frontier_smollm2.json`, float32 "
        "on a CPU; [what corrections are worth](docs/correction-results.md#the-frontier) has more points."
    )
    table_ = table(["plan", "layers changed", "FLOPs of dense", *texts], lines)
    equal = found["at_equal_flops"]
    return "\n\n".join([table_, " ".join(_ahead(equal)), *_apart(equal), note])


def _layers(plan: dict[str, float]) -> str:
    removed, selecting = sum(r == 0 for r in plan.values()), sum(0 < r < 1 for r in plan.values())
    return ", ".join([f"{removed} removed"] * bool(removed) + [f"{selecting} select a third"] * bool(selecting))


def _ahead(equal: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Who is ahead at equal FLOPs, of the methods that were measured near them."""
    sentences = []
    for share, rows in equal.items():
        texts = [text for text in TEXTS if text in rows[0]["perplexity"]]
        best = {text: min(rows, key=lambda row, text=text: row["perplexity"][text])["method"] for text in texts}
        winners = list(dict.fromkeys(best.values()))
        if len(winners) == 1:
            said = f"**{title(winners[0])}** has the lowest perplexity on all {len(texts)} texts"
        else:
            said = "; ".join(
                f"**{title(w)}** has the lowest perplexity on {' and '.join(t for t in texts if best[t] == w)}"
                for w in winners
            )
        sentences.append(f"At {share} of the FLOPs, of {len(rows)} methods measured there, {said}.")
    return sentences


def _apart(equal: dict[str, list[dict[str, Any]]]) -> list[str]:
    """A sentence and a table: paired differences from removed layers of the same kind, at each share."""
    lines = []
    for share, rows in equal.items():
        for row in rows:
            if apart := row.get("against_removed"):
                kind = row["method"].partition(",")[2]
                other = title(f"removed,{kind}" if kind else "removed")
                cells = [
                    f"{apart[text]['difference']:+.3f} ± {apart[text]['standard_error']:.3f}" if text in apart else ""
                    for text in TEXTS
                ]
                lines.append([share, title(row["method"]), other, *cells])
    if not lines:
        return []
    said = "At equal FLOPs, nats a token with standard errors; below zero, the first plan is better:"
    return [said, table(["FLOPs of dense", "plan", "against", *TEXTS], lines)]


def paper_section() -> str:
    """The paper's Table 1 for two models, marked as the paper's."""
    from orthorank.reproduce import paper

    at = {name: paper.MODELS.index(name) for name in PAPER}
    lines = []
    for row, said in PAPER_ROWS.items():
        cells = []
        for name in PAPER:
            cells += [f"{paper.PERPLEXITY[row][at[name]]:.2f}", f"{paper.ACCURACY[row][at[name]]:.1f}"]
        lines.append([said, *cells, f"{paper.THROUGHPUT[row]:.2f}x"])
    head = ["the paper's Table 1"]
    for name in PAPER:
        head += [f"{name}: perplexity, C4", "zero-shot, %"]
    return table([*head, "throughput, A6000"], lines)
