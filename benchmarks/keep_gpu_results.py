"""Copy what a campaign measured on a GPU to `benchmarks/results/<name of the GPU>/`: README and docs read it there.

    python benchmarks/keep_gpu_results.py build/gpu/<time>/B    # B's output has A's lines, too
    python benchmarks/readme.py

Keeps the raw lines, the table, and ``about.json``: the card, versions and date. A dry run is refused. Launch settings
that were measured lie in the output's ``files-b.tar``; look at them before they go to
`orthorank_kernels/settings/configs/`.
"""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.campaign import lines
from benchmarks.readme_gpu import FILE

RESULTS = Path(__file__).resolve().parent / "results"
ABOUT = ("gpu", "torch", "triton", "transformers", "numpy", "python", "commit", "date")


def slug(gpu: str) -> str:
    """A folder's name.

    >>> slug("NVIDIA H100 80GB HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub("[^a-z0-9]+", "-", gpu.lower()).strip("-")


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder that a campaign wrote")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the folder of the GPU is made")
    options = parser.parse_args(given)
    found = lines.read(options.output / "results.jsonl")
    known = [line for line in found if line.get("gpu", "unknown") != "unknown"]
    fault = ""
    if not known:
        fault = "holds no results of a GPU; name the folder that --output was"
    elif any(line.get("dry") for line in found):
        fault = "is a dry run on a CPU, which says nothing of a GPU"
    if fault:
        print(f"keep_gpu_results: {options.output} {fault}", file=sys.stderr)
        return 2
    folder = options.results / slug(known[-1]["gpu"])
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(options.output / "results.jsonl", folder / FILE)
    shutil.copyfile(options.output / "table.md", folder / "table.md")
    about = {name: known[-1].get(name, "unknown") for name in ABOUT}
    (folder / "about.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {folder}; now run: python benchmarks/readme.py")
    return 0


if __name__ == "__main__":
    sys.exit(main())
