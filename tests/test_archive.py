"""The source archive holds what its tests read, and no pictures of results; the wheel holds the two packages."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHOICE = "not slow and not gpu and not browser and not vllm"  # as `make test`
READ_FILES = (
    "tests/docs", "tests/examples", "tests/test_readme.py", "tests/test_docs.py", "tests/test_arrow.py",
    "tests/test_kinds.py", "tests/benchmarks/test_committed_reports.py", "tests/benchmarks/test_frontier.py",
    "tests/orthorank/common/test_plot.py", "tests/orthorank/search/test_saved_edges.py",
    "tests/ptx/test_emitted.py", "packages/ptx-check/tests/test_check.py", "packages/ptx-check/tests/test_tutorials.py",
)  # fmt: skip


def built(kind: str, folder: Path) -> Path:
    """The archive or the wheel, as `make package` builds it."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = folder.iterdir()
    return file


@pytest.mark.slow
def test_the_source_archive_passes_its_tests(tmp_path: Path) -> None:
    """Those that read files of the repository: pages, examples, committed results, ptx-check beside."""
    with tarfile.open(built("sdist", tmp_path / "dist")) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = (path for path in tmp_path.iterdir() if path.name != "dist")
    held = {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}
    assert {"Makefile", "packages/ptx-check/pyproject.toml", "examples/quickstart.ipynb", ".ci/run"} <= held
    assert not [name for name in held if name.startswith("benchmarks/results/") and name.endswith((".png", ".svg"))]
    assert not [name for name in held if "/cells/" in name or "__pycache__" in name]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", CHOICE, *READ_FILES]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:]


@pytest.mark.slow
def test_the_wheel_holds_the_two_packages(tmp_path: Path) -> None:
    with zipfile.ZipFile(built("wheel", tmp_path)) as wheel:
        tops = {name.partition("/")[0] for name in wheel.namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"orthorank", "orthorank_kernels"}
