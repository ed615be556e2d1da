"""The plugin where there is no vLLM, or one that lacks something: silent, or one sentence; it never stops a process.

In fresh processes, with a package called vllm that holds what the plugin looks for, and stops whoever imports it.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from orthorank.integrations.vllm import hooks

ROOT = Path(__file__).resolve().parents[2]
REGISTER = """
import sys
sys.path.insert(0, {folder!r})
from orthorank.integrations.vllm import register
register()
register()
heavy = [name for name in ("torch", "transformers", "numpy", "triton") if name in sys.modules]
assert not heavy, heavy
imported = [name for name in {modules!r} if name in sys.modules]
assert not imported, imported
"""


def registered(folder: Path, code: str = REGISTER) -> subprocess.CompletedProcess[str]:
    code = code.format(folder=str(folder), modules=list(hooks.NEEDED))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A vLLM of sources: every module that is looked into, with the names that it must have."""
    for module, names in hooks.NEEDED.items():
        file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("raise SystemExit('imported')\n" + "".join(f"{name} = None\n" for name in names))
    for folder in {parent for file in tmp_path.rglob("*.py") for parent in file.parents if tmp_path in parent.parents}:
        stops = "" if folder.name == "vllm" else "raise SystemExit('imported')\n"
        (folder / "__init__.py").write_text(stops)
    return tmp_path


def lack(package: Path, module: str, name: str) -> None:
    """Take ``name`` out of ``module``, but for a longer name that holds it."""
    file = package.joinpath(*module.split(".")).with_suffix(".py")
    file.write_text(file.read_text().replace(f"{name} = None", f"my_{name}_2 = None"))


def test_without_vllm_nothing_happens() -> None:
    assert registered(Path("/nowhere")).stderr == ""


@pytest.mark.parametrize(
    ("module", "name"), [(module, names[-1]) for module, names in hooks.NEEDED.items()], ids=lambda value: value
)
def test_a_name_that_is_gone(package: Path, module: str, name: str) -> None:
    """Said each time that vLLM calls, in one line, and nothing is imported."""
    lack(package, module, name)
    lines = registered(package).stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("orthorank: the installed vLLM ")
        assert f" lacks {module}.{name}, so no OrthoRank model is registered; " in line
        assert line.endswith(f"this package is tested with vLLM {hooks.TESTED}")


def test_modules_that_are_gone(package: Path) -> None:
    (package / "vllm" / "forward_context.py").unlink()
    worker = package / "vllm" / "v1" / "worker"
    for file in worker.iterdir():
        file.unlink()
    worker.rmdir()
    line = registered(package).stderr.splitlines()[0]
    for module in ("vllm.forward_context", "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu_input_batch"):
        assert all(f"{module}.{name}" in line for name in hooks.NEEDED[module])


def test_an_empty_folder_called_vllm(tmp_path: Path) -> None:
    """Such as one of checkpoints or of notes beside a script: not a package, and nothing of it is there."""
    (tmp_path / "vllm").mkdir()
    lines = registered(tmp_path).stderr.splitlines()
    assert all(line.startswith("orthorank: ") for line in lines)


def test_everything_is_there(package: Path) -> None:
    code = "import sys; sys.path.insert(0, {folder!r})\nfrom orthorank.integrations.vllm import hooks\n"
    registered(package, code + "assert hooks.missing() == [], hooks.missing()")
