"""The README's section of `orthorank reproduce`: the paper's main rows on SmolLM2, and a verdict on each claim."""

from typing import Any

FOLDER = "reproduce/smollm2-135m"
METHODS = {"sleb": "SLEB", "shortened": "Shortened LLaMA"}


def main_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: perplexity, mean zero-shot accuracy, prefill speed beside the FLOP bound."""
    accuracies = {row["row"]: row["accuracy"]["mean"] for row in summary["table2"]["rows"]}
    texts = list(summary["texts"])
    head = ["", "layers", *(f"perplexity, {text}" for text in texts), "zero-shot mean", "prefill", "FLOP bound"]
    rows = [
        [
            _name(row["row"]),
            str(len(row["plan"]["layers"])) if row["plan"] else "",
            *(f"{row['perplexity'][text]['perplexity']:.1f}" for text in texts),
            f"{100 * accuracies[row['row']]:.1f}",
            f"{row['throughput']['speedup']:.2f}x",
            f"{row['throughput']['flop_speedup']:.2f}x",
        ]
        for row in summary["table1"]["rows"]
    ]
    return head, rows


def claim_rows(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: every claim but those of single layers, which Figure 4's claim sums up."""
    rows = []
    for claim in summary["claims"]:
        if claim["claim"].startswith("layer "):
            continue
        error = claim["standard_error"]
        figure = f"{claim['figure']:.3f}" + ("" if error is None else f" ± {error:.3f}")
        rows.append([claim["claim"], figure, f"{claim['threshold']:g}", f"**{claim['verdict']}**", claim["detail"]])
    return ["claim of the paper", "figure", "must exceed", "verdict", "behind it"], rows


def corrected_note(summary: dict[str, Any]) -> str:
    """What maps that are fitted to the windows of the searches do for the last row."""
    row, calibration = summary["corrected"]["rows"][-1], summary["sizes"]["calibration"]
    plain = next(found["accuracy"] for found in summary["table2"]["rows"] if found["row"] == row["row"])
    texts = ", ".join(
        f"{row['plain_perplexity'][text]['perplexity']:.1f} to {found['perplexity']:.1f} on {text}"
        for text, found in row["perplexity"].items()
    )
    return (
        f"Beyond the paper: with maps of rank {row['rank']} fitted to the {calibration['tokens']:,} tokens that the "
        f'layers were chosen on, the row "{_name(row["row"])}" goes from {texts}, and from {100 * plain["mean"]:.1f} '
        f"to {100 * row['accuracy']['mean']:.1f} in zero-shot tasks. So few tokens, of one kind of text, are too few "
        "for another kind."
    )


def note(summary: dict[str, Any]) -> str:
    """What it was measured on."""
    speed, sizes = summary["table1"]["rows"][0]["throughput"], summary["sizes"]
    held = ", ".join(f"{size['windows']} windows of {name}" for name, size in sizes["held_out"].items())
    return (
        f"`{summary['model']['name']}` in {summary['model']['dtype']} on a CPU; {held}; the first {sizes['task_rows']} "
        f"rows of each zero-shot set; prefill of {speed['prompt']:,} tokens on {speed['threads']} threads. From "
        f"`orthorank reproduce`; every cell, Tables 3 and 4, the sweep to 50 %, LongBench and the pictures are in "
        f"[benchmarks/results/{FOLDER}](benchmarks/results/{FOLDER}/tables.md)."
    )


def _name(row: str) -> str:
    """``"sleb-20+orthorank"`` as "20 %: SLEB + OrthoRank"."""
    if row == "dense":
        return "dense"
    method, _, percent = row.removesuffix("+orthorank").partition("-")
    return f"{percent} %: {METHODS[method]}" + (" + OrthoRank" if row.endswith("+orthorank") else "")
