"""What README and pages say of GPUs: tables from `benchmarks/results/<GPU>/campaign.jsonl`, or that there are none."""

from pathlib import Path
from typing import Any

from benchmarks.campaign import lines, summary, tables

FILE = "campaign.jsonl"
NONE = (
    "**No GPU figure is claimed.** The kernels were run by Triton's interpreter, compiled for four GPU targets, and\n"
    "their PTX was executed under random schedules with a race check ([docs/ptx.md]({docs}ptx.md)); speed on a GPU\n"
    "has not been measured. `make gpu` runs the parity tests and the benchmarks on one ([docs/gpu.md]({docs}gpu.md))."
)
SHOWN = ("SDPA cuDNN, all tokens", "SDPA flash, all tokens", "FlexAttention")


def measured(results: Path) -> dict[str, list[lines.Line]]:
    """The lines of each GPU that was measured, by its folder's name."""
    return {path.parent.name: lines.read(path) for path in sorted(results.glob(f"*/{FILE}"))}


def section(results: Path, docs: str = "docs/") -> str:
    """For each GPU: prefill beside the FLOP bound, and attention beside its peers. Without any, that there is none.

    ``docs``: the way from the page to the folder of the documentation.
    """
    found = measured(results)
    if not found:
        return NONE.format(docs=docs)
    return "\n\n".join(of_one(name, own) for name, own in found.items())


def of_one(folder: str, own: list[lines.Line]) -> str:
    parts = [about(folder, own)]
    if rows := [tables.prefill_row(row) for row in summary.forwards(own)]:
        parts.append(tables.table(tables.PREFILL_HEAD, rows))
    if rows := attention_rows(own):
        head = ["attention of a third of the tokens", "TFLOP/s", *SHOWN]
        parts.append(tables.table(head, rows))
    return "\n\n".join(parts)


def about(folder: str, own: list[lines.Line]) -> str:
    """What it was measured on, and with what. What fails is not hidden: the count of wrong results stands here."""
    last: dict[str, Any] = own[-1]
    wrong = sum(line.get("status") == "wrong" for line in own)
    tests = summary.outcomes(own, "parity")
    checks = ", ".join(f"{number:,} {status}" for status, number in sorted(tests.items()))
    said = (
        f"Measured on one {last['gpu']} with torch {last['torch']}, Triton {last['triton']} and transformers "
        f"{last['transformers']}, {last['date']}; random weights, so quality is not measured. Rates are of needed "
        f"query-key pairs, with the peers' beside them. Results that were wrong: {wrong}"
    )
    said += f"; kernel tests on it: {checks}" if checks else ""
    return f"{said}. Everything: `benchmarks/results/{folder}/{FILE}`, from `make gpu`."


def attention_rows(own: list[lines.Line]) -> list[list[str]]:
    """One row for each shape that ours ran: its rate, and those of `SHOWN`."""
    found = {
        (line["shape"], line["provider"]): line["rate"]
        for line in summary.times(own, "attention")
        if line["mode"] == "replay"
    }
    ours = {shape: rate for (shape, who), rate in found.items() if who.startswith(summary.OURS)}
    return [
        [shape, f"{rate:.0f}", *(f"{found[shape, peer]:.0f}" if (shape, peer) in found else "" for peer in SHOWN)]
        for shape, rate in ours.items()
    ]
