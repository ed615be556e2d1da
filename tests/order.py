"""Each test file in a process of its own, then the suite in random orders: ``python -m tests.order [FILE ...]``.

``make test-order`` runs it, for some hours. Files that fail alone are printed, and orders by their seed: to see one
again, ``python -m pytest -p randomly --randomly-seed=SEED`` and the files that ran (``-v`` prints the order).
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHOICE = ("-m", "not slow and not gpu and not browser and not vllm")  # as `make test`
NO_TESTS = 5  # pytest's exit code, where all tests of a file are left out


def pytest(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """One run in a fresh process."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CHOICE, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def told(name: str, run: "subprocess.CompletedProcess[str]") -> bool:
    """Whether it passed; if not, what it said."""
    passed = run.returncode in (0, NO_TESTS)
    last = (run.stdout.strip() or run.stderr.strip() or "nothing was said").splitlines()[-1]
    print(f"{'ok' if passed else 'FAILED'}  {name}: {last}", flush=True)
    if not passed:
        print(run.stdout, run.stderr, sep="\n", flush=True)
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
    with ThreadPoolExecutor(options.workers) as pool:
        alone = [told(name, run) for name, run in zip(names, pool.map(pytest, names), strict=True)]
    again = names if options.files else []  # without names the examples in docstrings are run, too
    shuffled = [
        told(f"seed {seed}", pytest("-n", str(options.workers), "-p", "randomly", f"--randomly-seed={seed}", *again))
        for seed in options.seeds
    ]
    failed = [name for name, passed in zip(names, alone, strict=True) if not passed]
    failed += [f"seed {seed}" for seed, passed in zip(options.seeds, shuffled, strict=True) if not passed]
    print("all passed" if not failed else f"failed: {', '.join(failed)}")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
