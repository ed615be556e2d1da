"""Each test file in a process of its own, then the suite in random orders: ``python -m tests.order [FILE ...]``.

``make test-order`` runs it, for an hour or two. Files that fail alone are printed, and orders by their seed: to see one
again, ``python -m pytest -p randomly --randomly-seed=SEED`` and the files that ran (``-v`` prints the order).

A file's process is forked from one that has imported PyTorch and Transformers, and nothing of this project: without
that, most of the time would go into importing them 250 times.
"""

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CHOICE = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu and not browser and not vllm")  # as `make test`
NO_TESTS = 5  # pytest's exit code, where all tests of a file are left out
# The set-up first: it decides whether Triton interprets, which counts when something imports it.
IMPORTED = ["tests.conftest", "transformers.models.llama.modeling_llama", "hypothesis"]


class Run(NamedTuple):
    """How a run ended, and what it printed."""

    status: int
    printed: str


def alone(name: str, output: str) -> None:
    """The tests of one file, in this process, which runs nothing else; what they print goes to the file ``output``."""
    import pytest

    with open(output, "wb") as file:
        for stream in (1, 2):  # what native code and subprocesses print, too
            os.dup2(file.fileno(), stream)
    sys.exit(int(pytest.main([*CHOICE, name])))


def in_fork(processes: Any, name: str) -> Run:
    """`alone` in a process of its own; no pool's, which would wait for ever for one that a signal ended."""
    with tempfile.NamedTemporaryFile() as file:
        process = processes.Process(target=alone, args=(name, file.name))
        process.start()
        process.join()
        printed = Path(file.name).read_text(encoding="utf-8", errors="replace")
    if process.exitcode < 0:
        printed += f"\nended by signal {-process.exitcode}"
    return Run(process.exitcode, printed)


def in_order(seed: int, workers: int, names: Sequence[str]) -> Run:
    """The suite in a random order."""
    chosen = ["-n", str(workers), "-p", "randomly", f"--randomly-seed={seed}"]
    command = [sys.executable, "-m", "pytest", *CHOICE, *chosen, *names]
    run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return Run(run.returncode, run.stdout)


def told(name: str, run: Run) -> bool:
    """Whether it passed; if not, what it said."""
    passed = run.status in (0, NO_TESTS)
    last = (run.printed.strip() or "nothing was said").splitlines()[-1]
    print(f"{'ok' if passed else 'FAILED'}  {name}: {last}", flush=True)
    if not passed:
        print(run.printed, flush=True)
    return passed


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where every file and every order passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="test files and folders; all of tests/ by default")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time")
    parser.add_argument("--seeds", type=int, nargs="*", default=[1, 2, 3], help="of the random orders")
    options = parser.parse_args(arguments)
    given = [Path(name).resolve() for name in options.files] or [ROOT / "tests"]
    files = [file for one in given for file in (sorted(one.rglob("test_*.py")) if one.is_dir() else [one])]
    names = [str(file.relative_to(ROOT)) for file in files]
    os.chdir(ROOT)
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(IMPORTED)
    with ThreadPoolExecutor(options.workers) as pool:
        runs = pool.map(partial(in_fork, processes), names)
        each = [told(name, run) for name, run in zip(names, runs, strict=True)]
    again = names if options.files else []  # without names the examples in docstrings are run, too
    shuffled = [told(f"seed {seed}", in_order(seed, options.workers, again)) for seed in options.seeds]
    failed = [name for name, passed in zip(names, each, strict=True) if not passed]
    failed += [f"seed {seed}" for seed, passed in zip(options.seeds, shuffled, strict=True) if not passed]
    print("all passed" if not failed else f"failed: {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
