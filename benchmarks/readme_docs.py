"""Tables of the pages in docs/, from committed results."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results")


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def criteria_section() -> str:
    """Every row of Table 3, on the shipped plan's layers."""
    rows = load("criteria_smollm2.json")["table3"]["rows"]
    lines = []
    for name, row in rows.items():
        loss = f"{row['loss']:+.4f} ± {row['error']:.4f}" if row["error"] else f"{row['loss']:+.4f}"
        lines.append([name, f"{row['perplexity']:.2f}", loss])
    return table(["", "perplexity", "loss"], lines)


def modes_section() -> str:
    """All modes side by side."""
    lines = []
    for name, row in load("modes_smollm2.json")["variants"].items():
        shares = list(row["achieved"].values())
        updated = f"{sum(shares) / len(shares):.3f}, {min(shares):.3f} to {max(shares):.3f}" if shares else "all"
        error = f" ± {row['standard_error']:.4f}" if row["standard_error"] else ""
        lines.append([name, f"{row['perplexity']:.2f}", f"{row['above_topk']:+.4f}{error}", updated])
    return table(["mode", "perplexity", "loss above topk", "tokens updated: mean, least and most in a layer"], lines)


def pooled_section() -> str:
    """Cosines of pooled states to the dense model's."""
    found = load("pooled_smollm2.json")
    lines = []
    for row in found["rows"]:
        cells = [f"{row[way]['mean']:.3f} ({row[way]['least']:.3f})" for way in ("kept", "not_forced")]
        lines.append([f"{row['sparsity']:.0%}", *cells])
    head = ["plan", "cosine with the token kept: mean (least)", "where it may be left out"]
    note = (
        f"{found['texts']} documents of C4, their first {found['tokens']} tokens; from `python "
        "benchmarks/bench_pooled.py --json benchmarks/results/pooled_smollm2.json`."
    )
    return f"{table(head, lines)}\n\n{note}"


def multiple_section() -> str:
    """What rounding keep counts up is worth."""
    lines = []
    for row in load("multiple_smollm2.json")["rows"]:
        against = row["against_1"]
        change = f"{against['difference']:+.4f} ± {against['standard_error']:.4f}" if row["multiple"] > 1 else ""
        updated = f"{row['updated']:,}"
        flops = f"{row['flops']:.3f}"
        lines.append([f"{row['tokens']:,}", str(row["multiple"]), updated, flops, f"{row['perplexity']:.2f}", change])
    head = ["tokens", "`keep_multiple`", "updated", "FLOPs of the dense model's", "perplexity", "loss against 1"]
    return table(head, lines)


def search_section() -> str:
    """Plain, exact and fast search."""
    r = load("search_smollm2.json")
    ways = {"plain": "plain loop", "exact": "exact", "fast": "`--fast`"}
    lines = [
        [
            title,
            f"{r['wall_seconds'][name]:.0f} s",
            f"{r['wall_ratio'].get(name, 1.0):.2f}x",
            f"{r['cpu_ratio'].get(name, 1.0):.2f}x",
            f"{r['losses'].get(name, r['losses']['exact'])[-1]:.4f}",
        ]
        for name, title in ways.items()
    ]
    return table(["search", "wall clock", "faster", "by processor time", "loss of the plan"], lines)


def search_corrected_section() -> str:
    """What maps cost a search, by processor time against the same search without them."""
    found = load("search_corrected_smollm2.json")
    seconds = found["cpu_seconds"]
    option = f"`--correct {found['rank']}`"
    against = {"corrected": "exact", "corrected, fast": "fast"}
    titles = {"exact": "exact", "fast": "`--fast`", "corrected": option, "corrected, fast": f"{option} `--fast`"}
    lines = [
        [
            title,
            f"{seconds[name]:.0f} s",
            f"{seconds[name] / seconds[against[name]]:.1f}x {titles[against[name]]}" if name in against else "",
            f"{found['losses'][name][-1]:.4f}",
        ]
        for name, title in titles.items()
    ]
    return table(
        ["search", "processor time", "against the same without maps", "loss of the plan, with its maps"], lines
    )


def zeroshot_section() -> str:
    """Zero-shot accuracy of the frontier's plans."""
    found = load("zeroshot_smollm2.json")
    lines = []
    for row in found["rows"]:
        apart = [row.get(name) for name in ("against_dense", "against_removed")]
        apart[0] = None if row["method"] == "dense" else apart[0]
        said = ["" if each is None else f"{each['mean']:+.1f} ± {each['standard_error']:.1f}" for each in apart]
        name, values = row["method"].replace(",", ", "), [f"{value:.1f}" for value in row["tasks"].values()]
        lines.append([name, f"{row['flops']:.3f}", *values, f"{row['mean']:.1f}", *said])
    tasks = [name.replace("_", "-") for name in found["rows"][0]["tasks"]]
    return table(["plan", "FLOPs of dense", *tasks, "mean", "against dense", "against removed"], lines)


def correction_section() -> str:
    """Ways to correct a plan, each against the package's fit."""
    found = load("correction_smollm2.json")
    names = list(found["rows"][0]["perplexity"])
    lines = []
    for row in found["rows"]:
        cells = []
        for name in names:
            apart = row["against_usual"].get(name)
            said = "" if apart is None else f" ({apart['at_equal_flops']:+.3f} ± {apart['standard_error']:.3f})"
            cells.append(f"{row['perplexity'][name]:.1f}{said}")
        lines.append([row["name"], f"{row['flops']:.3f}", *cells])
    return table(["plan", "FLOPs of dense", *names], lines)


def retrieval_section() -> str:
    """What plans find again in long prompts, of what the dense model does."""
    found = load("retrieval_smollm2.json")["prompts"]
    head = ["plan", "FLOPs of dense"]
    for kind, each in found.items():
        head += [f"{kind}, n = {each['answered']}", "against the same plan"]
    lines = []
    for rows in zip(*(each["rows"] for each in found.values()), strict=True):
        line = [rows[0]["name"], f"{rows[0]['flops']:.3f}"]
        for row in rows:
            apart = row.get("against_plain")
            said = "" if apart is None else f"{apart['difference']:+.1f} ± {apart['standard_error']:.1f}"
            line += [f"{row['score']:.1f} ± {row['standard_error']:.1f}", said]
        lines.append(line)
    of = [
        f"{kind}: {each['tried']} tried, on which the dense model scores {each['dense_score']:.1f}"
        for kind, each in found.items()
    ]
    return f"{table(head, lines)}\n\n{'; '.join(of)}."


def frontier_section() -> str:
    """Plans at their share of the dense model's FLOPs, on three texts."""
    found = load("frontier_smollm2.json")
    names = list(found["rows"][0]["perplexity"])
    lines = []
    for row in found["rows"]:
        ratios = list(row["plan"].values())
        removed, selecting = ratios.count(0.0), sum(0 < ratio < 1 for ratio in ratios)
        counts = [f"{removed} removed"] * bool(removed) + [f"{selecting} selecting"] * bool(selecting)
        cells = []
        for name in names:
            apart = row["against_dense"][name]
            said = f" (+{apart['difference']:.3f} ± {apart['standard_error']:.3f})" if row["plan"] else ""
            cells.append(f"{row['perplexity'][name]:.1f}{said}")
        lines.append([row["method"].replace(",", ", "), ", ".join(counts) or "none", f"{row['flops']:.3f}", *cells])
    return table(["plan", "layers changed", "FLOPs of dense", *names], lines)


def chat_section() -> str:
    """The second turn of a chat inside vLLM, with and without blocks of generated tokens."""
    found = load("vllm_chat_smollm2.json")
    most = found["sizes"]["second_answer"]
    lines = []
    for name, row in found["modes"].items():
        cached, apart = row["cached"], row["first_token_difference"]
        lines.append(
            [
                f'`"{name}"`',
                f"{sum(cached['all']) // len(cached['all'])} against {sum(cached['prompt']) // len(cached['prompt'])}",
                f"{apart['mean']:.2f}, {apart['largest']:.2f}",
                f"{', '.join(map(str, row['equal_greedy_tokens']))} of {most}",
            ]
        )
    head = ["`--reuse all` against `prompt`", "cached tokens", "log-probabilities: mean, largest difference"]
    return table([*head, "equal greedy tokens, by conversation"], lines)
