"""The table of a campaign, in Markdown, from its lines."""

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.campaign import summary
from benchmarks.campaign.lines import Line

MOST_NOTE = 240  # characters
VERSIONS = ("gpu", "torch", "triton", "transformers", "python", "commit", "date")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def markdown(lines: Sequence[Line]) -> str:
    """Everything, by step; then what failed and what was left out."""
    parts = ["# GPU campaign", header(lines)]
    for step in summary.steps(lines):
        own = [line for line in lines if line.get("step") == step]
        sections = [
            section
            for section in (facts(own), timed(own, step), beside(own), prefill(own), checks(own, step))
            if section
        ]
        if sections:
            parts += [f"## {step}", *sections]
    if found := summary.troubles(lines):
        parts += ["## What failed, was left out or switched off", trouble(found)]
    return "\n\n".join(parts) + "\n"


def header(lines: Sequence[Line]) -> str:
    if not lines:
        return "Nothing was measured."
    last = lines[-1]
    known = next((line["gpu"] for line in reversed(lines) if line.get("gpu", "unknown") != "unknown"), "unknown")
    said = "; ".join(f"{name} {known if name == 'gpu' else last.get(name, 'unknown')}" for name in VERSIONS)
    if last.get("dry"):
        said = f"**A dry run on a CPU: no figure here says anything of a GPU.** {said}"
    return said


def facts(lines: Sequence[Line]) -> str:
    """What is known of the machine, and the ceilings."""
    rows = []
    for line in lines:
        if line.get("kind") == "fact":
            rows.append([str(line["what"]), short(str(line["value"]))])
        if line.get("kind") == "ceiling":
            rows.append([f"{line['what']}, measured", f"{line['rate']:,.4g} {line['unit']}"])
    return table(["what", "value"], rows) if rows else ""


def timed(lines: Sequence[Line], step: str) -> str:
    rows = []
    for line in summary.times(lines, step):
        known = summary.expected_share(line["op"]) if line["provider"].startswith(summary.OURS) else {}
        rows.append(
            [
                line["op"],
                line["shape"],
                line["provider"],
                line["mode"],
                f"{line['median_us']:,.1f}",
                f"{line['spread']:.1%}",
                str(line["n"]),
                f"{line['rate']:,.4g} {line['unit']}",
                "" if line.get("share") is None else f"{line['share']:.0%}",
                f"{known['model']:.0%}" if known and line["mode"] == "replay" else "",
                "" if line.get("host_us") is None else f"{line['host_us']:,.0f}",
                short(line.get("note", "")),
            ]
        )
    head = ["op", "shape", "who", "how", "median us", "spread", "n", "rate", "of ceiling", "expected (estimate)",
            "host us", "note"]  # fmt: skip
    return table(head, rows) if rows else ""


def beside(lines: Sequence[Line]) -> str:
    """Attention against peers of the same run."""
    rows = [
        [
            row["shape"],
            row["ours"],
            row["peer"],
            f"{row['rate']:.2f}",
            f"{row['time']:.2f}x",
            "" if row["model"] is None else f"{row['model']:.2f}",
            "" if row["target"] is None else f"{row['target']:.2f}",
        ]
        for row in summary.ratios(lines)
    ]
    head = ["shape", "ours", "peer", "rate of needed pairs, ours / peer", "faster by", "expected (estimate)", "target"]
    return table(head, rows) if rows else ""


def prefill(lines: Sequence[Line]) -> str:
    rows = [prefill_row(row) for row in summary.forwards(lines)]
    return table(PREFILL_HEAD, rows) if rows else ""


PREFILL_HEAD = ["model", "prompts", "variant", "tokens/s", "speed-up", "FLOP-ideal", "seconds", "spread",
                "rounds (forwards)", "peak GB"]  # fmt: skip


def prefill_row(row: dict[str, Any]) -> list[str]:
    return [
        row["model"],
        row["shape"],
        row["variant"],
        f"{row['tokens_per_second']:,.0f}",
        "" if row["speedup"] is None else f"{row['speedup']:.3f}x",
        f"{row['ideal']:.3f}x",
        f"{row['seconds']:.4g}",
        f"{row['spread']:.1%}",
        f"{row['rounds']} ({row['forwards']})",
        f"{row['peak_gb']:.1f}",
    ]


def checks(lines: Sequence[Line], step: str) -> str:
    found = summary.outcomes(lines, step)
    return ", ".join(f"{count:,} {status}" for status, count in sorted(found.items())) if found else ""


def trouble(lines: Sequence[Line]) -> str:
    names = ("op", "model", "shape", "provider", "mode", "variant", "what", "test", "child")
    rows = [
        [line.get("step", ""), line["status"], short("; ".join(str(line[n]) for n in names if line.get(n))),
         short(str(line.get("note", "")))]
        for line in lines
    ]  # fmt: skip
    return table(["step", "status", "what", "note"], rows)


def short(text: str) -> str:
    """On one line of a table; the end of a long text says most."""
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= MOST_NOTE else f"... {text[-MOST_NOTE:]}"
