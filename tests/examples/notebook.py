"""Runs a notebook's cells without Jupyter, and keeps what they print in it.

python -m tests.examples.notebook examples/quickstart.ipynb     # writes its outputs again
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Any


def code_cells(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def kept(cell: dict[str, Any]) -> str:
    """What a cell printed when the notebook was written."""
    return "".join(line for output in cell["outputs"] for line in output["text"])


def run(cells: list[dict[str, Any]]) -> list[str]:
    """What each prints, one after the other in one namespace."""
    names: dict[str, Any] = {"__name__": "__main__"}
    said = []
    for number, cell in enumerate(cells, 1):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)
        said.append(printed.getvalue())
    return said


def main() -> None:
    path = Path(sys.argv[1])
    book = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    for number, (cell, text) in enumerate(zip(cells, run(cells), strict=True), 1):
        cell["execution_count"] = number
        stream = {"name": "stdout", "output_type": "stream", "text": text.splitlines(keepends=True)}
        cell["outputs"] = [stream] if text else []
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
