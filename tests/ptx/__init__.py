"""Runs the PTX that Triton emits for the kernels of this package, on a machine without a GPU.

Triton's interpreter runs the Python of a kernel; this runs what the compiler made of it, by `packages/ptx-check`, and
checks what a GPU would not report: races, barriers that are missing, memory that was never written. `docs/ptx.md` says
what is checked and what is not. The way through it:

    launchers.py     runs the launchers of `orthorank_kernels.triton`
    cases.py         what the test suite runs    worker.py     runs cases in a process of its own
    mutate.py        breaks a kernel on purpose, to see whether the checks notice
    uncovered.py     what is not run             probes.py     kernels of one instruction, to compare with a GPU
"""

import sys
from pathlib import Path

# That of this checkout, installed or not: on a machine with a GPU nothing is.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "packages" / "ptx-check" / "src"))
try:
    import ptx_check  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "ptx_check" or "pytest" not in sys.modules:
        raise
    import pytest

    pytest.skip("ptx_check is missing: pip install -e packages/ptx-check", allow_module_level=True)
