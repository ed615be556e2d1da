"""Importing is free, in both packages: no Triton, no transformers, no side effects; and imports run one way."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "orthorank_kernels"
HEAVY = ("triton", "transformers", "matplotlib", "lm_eval", "datasets", "typer", "rich")

# Makes the modules of `blocked` look as if they were not installed, which a None in sys.modules does not: find_spec
# raises on that.
BLOCK = """
import importlib.machinery, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            return None
        return importlib.machinery.PathFinder.find_spec(name, path, target)

sys.meta_path = [f if f is not importlib.machinery.PathFinder else Absent() for f in sys.meta_path]
"""

UNTOUCHED = """
import os, torch
before = dict(os.environ)
import {module}
assert dict(os.environ) == before, "importing wrote to the environment"
assert not torch.cuda.is_initialized(), "importing started a GPU context"
"""

EVERY_OP = """
import torch
import orthorank_kernels as ok
from tests.orthorank_kernels.every_op import Numbers, calls, flat

for backend in ("auto", "torch", "reference"):
    for name, call in calls(Numbers()).items():
        for tensor in flat(call(backend=backend)):
            assert not tensor.is_floating_point() or tensor.isfinite().all(), name
assert ok.keep_count(6, 0.5) == 3
assert ok.is_supported("gather_rows", device="cpu", dtype=torch.float32)[0]
try:
    calls(Numbers())["gather_rows"](backend="triton")
except ok.dispatch.BackendError as error:
    assert "Triton is not installed; run: pip install" in str(error), error
else:
    raise AssertionError("Triton ran though it is not installed")
"""


def run_fresh(code: str, blocked: tuple[str, ...]) -> None:
    """Run ``code`` in a new process in which ``blocked`` are not installed."""
    code = f"blocked = {blocked!r}\n{BLOCK}\n{code}"
    child = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr


def loads_nothing(names: tuple[str, ...]) -> str:
    return f"assert not (loaded := [n for n in {names!r} if n in sys.modules]), loaded\n"


def test_the_kernels_import_and_run_on_a_cpu_with_torch_alone():
    run_fresh(UNTOUCHED.format(module="orthorank_kernels") + EVERY_OP + loads_nothing(HEAVY), HEAVY)


def test_the_method_imports_without_triton_and_loads_nothing_heavy():
    run_fresh(UNTOUCHED.format(module="orthorank") + loads_nothing(HEAVY), ("triton",))


def test_the_kernels_load_nothing_heavy_though_it_is_installed():
    run_fresh(UNTOUCHED.format(module="orthorank_kernels") + loads_nothing(HEAVY), ())


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, and whether that happens when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {n for f in ast.walk(tree) if is_deferred(f) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ".".join(path.relative_to(ROOT).parent.parts[: -(node.level - 1) or None]) if node.level else ""
            base = ".".join(filter(None, (package, node.module)))
            names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield name, node not in inside


def is_deferred(node: ast.AST) -> bool:
    """Whether what is inside does not run when the file is imported."""
    only_for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return only_for_types or isinstance(node, (ast.FunctionDef, ast.Lambda))


def belongs_to(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


ARROWS = [
    ("pytorch", "triton", "it is what a machine without Triton runs"),
    ("pytorch", "orthorank_kernels.triton", "it is what a kernel's gradient is taken from"),
    ("reference", "orthorank_kernels.pytorch", "it defines what is correct"),
    ("reference", "triton", "it can be run without Triton"),
    ("reference", "orthorank_kernels.triton", "a reference defines what a kernel is compared with"),
    ("triton", "orthorank_kernels.reference", "a kernel that calls its reference hides its own faults"),
    ("", "orthorank", "the kernels know tensors, not models"),
    ("", "transformers", "the kernels know tensors, not models"),
]


@pytest.mark.parametrize(("folder", "forbidden", "because"), ARROWS)
def test_imports_run_one_way(folder, forbidden, because):
    files = sorted((KERNELS / folder).rglob("*.py"))
    assert files
    found = [f"{f.relative_to(ROOT)} imports {n}" for f in files for n, _ in imports(f) if belongs_to(n, forbidden)]
    assert not found, f"{found}: {because}"


def test_triton_is_imported_where_kernels_are_written_or_compiled_alone():
    rooms = {KERNELS / "triton", KERNELS / "triton" / "hopper", KERNELS / "tuning"}
    outside = [f for f in sorted(KERNELS.rglob("*.py")) if f.parent not in rooms]
    found = [
        f"{f.relative_to(ROOT)} imports {name}"
        for f in outside
        for name, _ in imports(f)
        if belongs_to(name, "triton") or belongs_to(name, "orthorank_kernels.triton")
    ]
    assert not found, "launchers are imported by name when they first run: see _library.launcher"


# A class of the harness, which nobody imports at the top.
ADAPTER = ROOT / "orthorank" / "evaluation" / "tasks.py"


def test_the_method_imports_heavy_packages_inside_functions():
    files = sorted((ROOT / "orthorank").rglob("*.py"))
    found = [
        f"{f.relative_to(ROOT)} imports {name} at the top"
        for f in files
        if f != ADAPTER
        for name, at_the_top in imports(f)
        if at_the_top
        and name.split(".")[0] in ("triton", "transformers", "matplotlib", "jinja2", "lm_eval", "datasets")
    ]
    assert not found
    importers = [
        str(f.relative_to(ROOT))
        for f in files
        for name, at_the_top in imports(f)
        if at_the_top and belongs_to(name, "orthorank.evaluation.tasks")
    ]
    assert not importers


def test_what_torch_2_6_does_not_compile_is_not_written():
    """Its Dynamo knows no ``isinstance(x, A | B)``, so that a graph breaks where a compiled model checks arguments."""
    found = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for package in (KERNELS, ROOT / "orthorank")
        for file in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and any(isinstance(argument, ast.BinOp) for argument in node.args[1:])
    ]
    assert not found, "write isinstance(x, (A, B))"
