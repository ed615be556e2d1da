"""What a plain search imports: its own room and those beneath, and of the methods the one that it runs."""

import subprocess
import sys
from pathlib import Path

from tests.orthorank.search_runs import short_text

ROOT = Path(__file__).parents[3]
MOST = 44  # modules of the package

SEARCH = """
import sys
from orthorank import cli
assert cli.main(sys.argv[1:]) == 0
print(*sorted(name for name in sys.modules if name.startswith("orthorank.")), sep="\\n")
"""


def loaded_by(folder: Path, output: Path, *more: str) -> set[str]:
    """The modules that ``orthorank search`` on the tiny model loads, in a new process."""
    words = ["search", str(folder), "--text", str(short_text(folder)), "--output", str(output), "--device", "cpu"]
    words += ["--layers", "2", "--windows", "2", "--window", "32", "--batch-size", "1", *more]
    done = subprocess.run(
        [sys.executable, "-c", SEARCH, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name for name in done.stdout.split() if name.startswith("orthorank.")}


def test_a_plain_search_loads_few_modules(tiny_folder: Path, tmp_path: Path) -> None:
    """The tiny model has no sink to find; where there is one, `orthorank.stack.sink` is one more."""
    loaded = loaded_by(tiny_folder, tmp_path, "--no-sink-floor")
    assert "orthorank.search.greedy" in loaded
    assert len(loaded) <= MOST, " ".join(sorted(loaded))
    rooms = {name.split(".")[1] for name in loaded}
    assert not rooms & {"demo", "report", "analysis", "reproduce", "calibration", "serving"}, rooms
    others = {"one_shot", "taylor", "influence"}
    assert not {name.rpartition(".")[2] for name in loaded} & others
    assert {name for name in loaded if name.startswith("orthorank.commands.")} == {
        "orthorank.commands.screen",
        "orthorank.commands.search",
    }
