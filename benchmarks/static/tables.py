"""The report as Markdown: the default settings in full, everything else in short, and the peers."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from benchmarks.static.case import REPORTED_TARGETS, TARGETS, worst_ratio
from benchmarks.static.peers import NOT_COMPILED
from benchmarks.static.store import Place, Row, Wanted

INTRODUCTION = """# What the kernels compile to

Written by `{command}`, with Triton {version}, without a GPU; no time was measured. Spills are instructions (on AMD
registers), occupancy is the share of the warps that a streaming multiprocessor or compute unit can hold, *wide* the
share of bytes that move 128 bits at a time. *ntm* is the number of instructions other than matrix instructions that
are issued per million floating-point operations of those, in attention's unmasked and masked loop: beyond 1,953 on an
A100 (sm_80) and 977 on an H100 (sm_90), issuing takes longer than multiplying. *KiB in flight* is what copies to
shared memory bring for all programs of a multiprocessor while these work, where that has a limit. *limit* is how much
of its tightest limit a kernel takes; gfx1100 has no limits.
"""

Column = tuple[str, Callable[[Row], str]]


def _number(name: str, form: str = "{:.0f}") -> Callable[[Row], str]:
    return lambda row: form.format(row[name]) if row.get(name) is not None else ""


def _spills(row: Row) -> str:
    hot = row.get("hot_spills")
    return f"{row['spills']}" + (f" ({hot} in the loop)" if hot and row["spills"] else "")


COLUMNS: list[Column] = [
    ("warps", _number("warps")),
    ("registers", _number("registers")),
    ("spills", _spills),
    ("shared KiB", lambda row: f"{row['shared'] / 1024:.1f}"),
    ("occupancy", _number("occupancy", "{:.0%}")),
    ("KiB in flight", lambda row: f"{row['in_flight'] / 1024:.0f}" if row.get("in_flight") is not None else ""),
    ("instructions", _number("instructions")),
    ("ntm", _number("ntm")),
    ("ntm masked", _number("ntm_masked")),
    ("wide loads", _number("wide_loads", "{:.0%}")),
    ("wide stores", _number("wide_stores", "{:.0%}")),
]


def markdown(rows: Mapping[Place, Row], wants: Iterable[Wanted], version: str, command: str) -> str:
    """The whole file."""
    wants = [want for want in wants if want.place in rows]
    ours = [want for want in wants if want.case.group != "peers"]
    parts = [INTRODUCTION.format(command=command, version=version)]
    for target in REPORTED_TARGETS:
        chosen = [want for want in ours if want.target == target and not want.case.slow]
        parts += [f"## Default settings, {target}\n", _full_table(rows, chosen)] if chosen else []
    peers = [want for want in wants if want.case.group == "peers"]
    parts += ["## Kernels of others\n", _peer_table(rows, peers)]
    parts += [f"- {name}: no machine code here ({why})." for name, why in NOT_COMPILED.items()]
    slow = [want for want in ours if want.case.slow]
    parts += ["\n## Every other setting: registers / spills / occupancy, and ntm of attention\n", _short(rows, slow)]
    return "\n".join(parts) + "\n"


def _full_table(rows: Mapping[Place, Row], wants: Iterable[Wanted]) -> str:
    lines = [["case", *(name for name, _ in COLUMNS), "limit"]]
    for want in wants:
        row = rows[want.place]
        if "error" in row:
            lines.append([want.case.name, row["error"], *[""] * len(COLUMNS)])
            continue
        ratio, name = worst_ratio(row, want.case.limits_for(want.target), want.target)
        shown = f"{ratio:.2f} ({name})" if name and want.target in TARGETS else ""
        lines.append([want.case.name, *(show(row) for _, show in COLUMNS), shown])
    return table(lines)


def _peer_table(rows: Mapping[Place, Row], wants: Iterable[Wanted]) -> str:
    lines = [["kernel", "target", *(name for name, _ in COLUMNS)]]
    for want in wants:
        row = rows[want.place]
        shown = [row["error"], *[""] * (len(COLUMNS) - 1)] if "error" in row else [show(row) for _, show in COLUMNS]
        lines.append([want.case.name, want.target, *shown])
    return table(lines)


def _short(rows: Mapping[Place, Row], wants: Iterable[Wanted]) -> str:
    cases: dict[str, dict[str, str]] = {}
    for want in wants:
        cases.setdefault(want.case.name, {})[want.target] = _cell(rows[want.place])
    lines = [["case", *TARGETS]]
    lines += [[name, *(cells.get(target, "") for target in TARGETS)] for name, cells in cases.items()]
    return table(lines)


def _cell(row: Row) -> str:
    if "error" in row:
        return "does not compile"
    ntm = f", ntm {row['ntm']:.0f}" if row.get("ntm") is not None else ""
    return f"{row['registers']} / {row['spills']} / {row['occupancy']:.0%}{ntm}"


def table(lines: list[list[Any]]) -> str:
    """A Markdown table whose first line is its head."""
    head, *body = lines
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *body)) + "\n"
