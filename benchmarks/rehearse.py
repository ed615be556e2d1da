"""Everything of the GPU campaign that needs no GPU, in the versions of a GPU machine: `make rehearse-gpu`.

    .venv-rehearse/bin/python benchmarks/rehearse.py             # all of it, an hour on 2 cores
    .venv-rehearse/bin/python benchmarks/rehearse.py --quick     # what comes just before a campaign: 8 minutes
    .venv-rehearse/bin/python benchmarks/rehearse.py --part probes

Each part is a process; the exit code is 1 when one fails, and the last lines say which.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NUMPY = Path(sys.prefix) / "NP22"  # for Triton's interpreter
IMPORTS = (
    "import orthorank, orthorank_kernels, torch, triton, transformers; "
    "from orthorank.speed.random_weights import random_model; "
    "from benchmarks.campaign.steps import *; import benchmarks.campaign.cuda; "
    "print('torch', torch.__version__, 'triton', triton.__version__, 'transformers', transformers.__version__)"
)
PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
COMPILE = ("benchmarks/compile_report.py",)
PLAIN = "not slow and not gpu and not browser and not vllm"


@dataclass(frozen=True)
class Part:
    """``quick``: also in a quick rehearsal. ``interpreter``: with the NumPy that Triton's interpreter knows."""

    name: str
    what: str
    command: Sequence[str]
    quick: bool = False
    interpreter: bool = False


def parts(folder: Path) -> list[Part]:
    campaign = "benchmarks/gpu_campaign.py"
    left = ("--machine", str(folder / "machine"), "--dry-run")
    return [
        Part("imports", "every module, from an uninstalled checkout", ("-c", IMPORTS), quick=True),
        Part("A", "campaign A, dry", (campaign, "A", "--output", str(folder / "A"), *left), quick=True),
        Part("B", "campaign B, dry", (campaign, "B", "--output", str(folder / "B"), *left), quick=True),
        Part("defaults", "default settings of every op compiled for sm_90", COMPILE, quick=True),
        Part("late", "what is late, hangs, crashes or is asked to stop",
             (*PYTEST, "tests/benchmarks", "-k", "(campaign or gpu_results or rehearse) and not dry_run")),
        Part("probes", "PTX instructions assembled for sm_80, sm_90a and sm_100a",
             (*PYTEST, "tests/ptx/test_on_gpu.py", "-k", "assembled")),
        Part("compiled", "models with a plan compiled: one graph for all layers, and counts that count",
             (*PYTEST, "tests/orthorank/hf/test_compiled_layers.py", "tests/orthorank/speed/test_bench_random.py"),
             interpreter=True),
        Part("settings", "all settings of every op compiled for sm_90", (*COMPILE, "--slow")),
        Part("hopper", "the limits of the attention kernel for sm_90", ("-m", "benchmarks.static.hopper")),
        Part("kernels", "the kernel tests in the interpreter",
             (*PYTEST, "-n", str(os.cpu_count() or 1), "-m", PLAIN, "tests/orthorank_kernels",
              "tests/benchmarks/test_micro.py", "tests/benchmarks/test_traffic.py",
              f"--ignore={OTHER_VERSIONS}"), interpreter=True),
    ]  # fmt: skip


# It holds limits of Triton 3.9's code.
OTHER_VERSIONS = "tests/orthorank_kernels/triton/test_compile.py"


def run(part: Part) -> tuple[int, float]:
    path = [str(NUMPY)] if part.interpreter else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]), "OMP_NUM_THREADS": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if part.interpreter else {}
    began = time.monotonic()
    code = subprocess.run([sys.executable, *part.command], cwd=ROOT, env=environment, check=False).returncode
    return code, time.monotonic() - began


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="imports, dry runs and default settings")
    parser.add_argument("--part", action="append", metavar="NAME", help="only this one; may be given again")
    options = parser.parse_args(given)
    with tempfile.TemporaryDirectory() as folder:
        known = parts(Path(folder))
        names = [part.name for part in known]
        for name in options.part or ():
            if name not in names:
                parser.error(f"--part is {name!r}; parts are {', '.join(names)}")
        wanted = [p for p in known if (p.name in options.part if options.part else p.quick or not options.quick)]
        said = []
        for part in wanted:
            print(f"== {part.name}: {part.what}", flush=True)
            code, seconds = run(part)
            said.append((part, code, seconds))
    for part, code, seconds in said:
        print(f"{'ok    ' if code == 0 else 'FAILED'} {seconds:6.0f} s  {part.name}: {part.what}")
    return int(any(code for _, code, _ in said))


if __name__ == "__main__":
    sys.exit(main())
