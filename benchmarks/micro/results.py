"""What the microbenchmarks measured, as rows, as CSV and as a plot."""

import csv
import json
from pathlib import Path
from typing import Any

COLUMNS = ("op", "shape", "provider", "device", "median_us", "quartile_range_us", "rounds", "rate", "unit")


def rows_of(report: Path, device: str) -> list[dict[str, Any]]:
    """From the JSON of pytest-benchmark, which holds only benchmarks whose check was passed."""
    rows = []
    for entry in json.loads(report.read_text(encoding="utf-8"))["benchmarks"]:
        info, stats = entry["extra_info"], entry["stats"]
        scale = {"GB/s": 1e9, "TFLOP/s": 1e12}[info["unit"]]
        rows.append(
            {
                "op": info["op"],
                "shape": info["shape"],
                "provider": info["provider"],
                "device": device,
                "median_us": round(stats["median"] * 1e6, 2),
                "quartile_range_us": round(stats["iqr"] * 1e6, 2),
                "rounds": stats["rounds"],
                "rate": float(f"{info['amount'] / stats['median'] / scale:.4g}"),
                "unit": info["unit"],
            }
        )
    return sorted(rows, key=lambda row: (row["op"], row["shape"], -row["rate"]))


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """One panel for each op and shape, one bar for each provider: the longer the better."""
    import matplotlib as mpl

    mpl.use("Agg")
    # The same figures give the same file, with text as text.
    mpl.rcParams |= {"svg.hashsalt": "orthorank", "svg.fonttype": "none"}
    from matplotlib import pyplot

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault(f"{row['op']}  {row['shape']}", []).append(row)
    heights = [len(panel) for panel in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(8, 0.32 * sum(heights) + 0.75 * len(panels)), squeeze=False, height_ratios=heights
    )
    for axis, (title, panel) in zip(axes[:, 0], panels.items(), strict=True):
        names = [row["provider"] for row in panel][::-1]
        rates = [row["rate"] for row in panel][::-1]
        colours = ["tab:orange" if name == "triton" else "tab:blue" for name in names]
        axis.barh(names, rates, color=colours)
        axis.bar_label(axis.containers[0], labels=[f" {rate:.3g}" for rate in rates], fontsize=8)
        axis.set_title(f"{title}  [{panel[0]['unit']}]", fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def table(rows: list[dict[str, Any]]) -> str:
    """For a terminal."""
    lines = []
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or (before["op"], before["shape"]) != (row["op"], row["shape"]):
            lines.append(f"\n{row['op']}  {row['shape']}")
        lines.append(f"  {row['provider']:<26} {row['median_us']:>12,.1f} us  {row['rate']:>10.4g} {row['unit']}")
    return "\n".join(lines)
