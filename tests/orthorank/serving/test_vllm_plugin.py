"""The plugin where there is no vLLM, or one that lacks something: silent, or one sentence; it never stops a process.

In fresh processes, with a package called vllm that holds what the plugin looks for, and stops whoever imports it.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orthorank.serving.vllm_interface import interface

ROOT = Path(__file__).resolve().parents[3]
REGISTER = """
import sys
sys.path.insert(0, {folder!r})
from orthorank.serving.vllm import register
register()
register()
heavy = [name for name in ("torch", "transformers", "numpy", "triton") if name in sys.modules]
assert not heavy, heavy
imported = [name for name in {modules!r} if name in sys.modules]
assert not imported, imported
"""


def registered(folder: Path, code: str = REGISTER) -> subprocess.CompletedProcess[str]:
    code = code.format(folder=str(folder), modules=list(interface.NEEDED))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return done


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A vLLM of sources: every module that is looked into, with the names that it must have."""
    for module, names in interface.NEEDED.items():
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
    ("module", "name"), [(module, names[-1]) for module, names in interface.NEEDED.items()], ids=lambda value: value
)
def test_a_name_that_is_gone(package: Path, module: str, name: str) -> None:
    """Said each time that vLLM calls, in one line, and nothing is imported."""
    lack(package, module, name)
    lines = registered(package).stderr.splitlines()
    assert len(lines) == 2
    for line in lines:
        assert line.startswith("orthorank: the installed vLLM ")
        assert f"{module}.{name} is not there, so no OrthoRank model is registered; " in line
        assert line.endswith(f"this package is tested with vLLM {interface.TESTED}")


def test_modules_that_are_gone(package: Path) -> None:
    (package / "vllm" / "forward_context.py").unlink()
    worker = package / "vllm" / "v1" / "worker"
    shutil.rmtree(worker)
    line = registered(package).stderr.splitlines()[0]
    for module in ("vllm.forward_context", "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu_input_batch"):
        assert all(f"{module}.{name}" in line for name in interface.NEEDED[module])


def test_an_empty_folder_called_vllm(tmp_path: Path) -> None:
    """Such as one of checkpoints or of notes beside a script: not a package, and nothing of it is there."""
    (tmp_path / "vllm").mkdir()
    lines = registered(tmp_path).stderr.splitlines()
    assert all(line.startswith("orthorank: ") for line in lines)


def test_everything_is_there(package: Path) -> None:
    code = "import sys; sys.path.insert(0, {folder!r})\nfrom orthorank.serving.vllm_interface import interface\n"
    registered(package, code + "assert interface.missing() == [], interface.missing()")


PARTS = {
    "__init__": "from vllm.model_executor.models.registry import ModelRegistry\n",
    "model_executor/models/registry": """
class ModelRegistry:
    known = {}
    get_supported_archs = staticmethod(lambda: ModelRegistry.known.keys())

    @staticmethod
    def register_model(model_arch, model_cls):
        ModelRegistry.known[model_arch] = model_cls
""",
    "config/__init__": """
from vllm.config.compilation import CompilationConfig
from vllm.config.vllm import VllmConfig
""",
    "config/compilation": """
class CompilationConfig:
    _attention_ops = ["vllm::unified_attention"]
""",
    "config/vllm": """
class VllmConfig:
    def __init__(self, architecture, **config):
        self.model_config = type("Model", (), {"architecture": architecture, "hf_config": type("C", (), config)})

    def try_verify_and_update_config(self):
        print("verified")
""",
    "model_executor/__init__": "",
    "model_executor/models/__init__": "",
    "model_executor/models/config": """
class VerifyAndUpdateConfig:
    @staticmethod
    def verify_and_update_config(vllm_config): ...


MODELS_CONFIG_MAP = {}
""",
}


@pytest.fixture
def importable(package: Path) -> Path:
    """The same, and what the plugin imports can be imported."""
    for name, content in PARTS.items():
        file = package / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        names = interface.NEEDED.get("vllm." + name.replace("/", "."), ())
        file.write_text(content + "".join(f"# {each}\n" for each in names))
    return package


def plugged(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    start = "import sys; sys.path.insert(0, {folder!r})\nfrom orthorank.serving.vllm import register\nregister()\n"
    command = [sys.executable, "-c", start.format(folder=str(folder)) + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_what_is_registered(importable: Path) -> None:
    code = """
from vllm import ModelRegistry
from vllm.config import CompilationConfig
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from orthorank.serving.vllm.hooks import ARCHITECTURES
register()
assert set(ModelRegistry.known) == set(MODELS_CONFIG_MAP) == set(ARCHITECTURES.values())
assert CompilationConfig._attention_ops == ["vllm::unified_attention"]  # other engines have it, too
assert not [name for name in sys.modules if name.startswith(("orthorank_kernels", "orthorank.config", "torch"))]
"""
    done = plugged(importable, code)
    assert (done.returncode, done.stderr) == (0, "")


CHANGES = [
    (
        "config/vllm",
        "try_verify_and_update_config(self)",
        "try_verify_and_update_config(self, how)",
        "argument how",
    ),
    ("model_executor/models/config", "MAP = {}", "MAP = None", "MODELS_CONFIG_MAP is None, not a dict"),
    ("model_executor/models/registry", "ModelRegistry.known.keys()", "None.keys()", "AttributeError: 'NoneType'"),
    (
        "model_executor/models/registry",
        "(model_arch, model_cls)",
        "(name, model_cls)",
        "register_model has no argument model_arch",
    ),
    (
        "model_executor/models/registry",
        "class ModelRegistry",
        "ModelRegistry, Registry = None, None\nclass Other",
        "registry.ModelRegistry.get_supported_archs is not there",
    ),
    ("model_executor/models/config", "class Verify", "raise OSError('half installed')\nclass Verify", "half installed"),
]


@pytest.mark.parametrize(("name", "old", "new", "said"), CHANGES, ids=[said for *_, said in CHANGES])
def test_a_private_name_of_another_type_stops_nobody(
    importable: Path, name: str, old: str, new: str, said: str
) -> None:
    """One sentence; a model without a plan is configured as ever."""
    file = importable / "vllm" / f"{name}.py"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    arguments = "3" if "how" in new else ""
    code = (
        f"from vllm.config import VllmConfig\nVllmConfig('LlamaForCausalLM').try_verify_and_update_config({arguments})"
    )
    done = plugged(importable, code)
    assert (done.returncode, done.stdout) == (0, "verified\n"), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("orthorank: the installed vLLM ")
    assert said in line


def test_a_plan_that_would_be_lost_is_refused(importable: Path) -> None:
    code = """
from vllm.config import VllmConfig
VllmConfig("LlamaForCausalLM", model_type="llama").try_verify_and_update_config()
VllmConfig("OrthoRankLlamaForCausalLM", model_type="llama", orthorank={}).try_verify_and_update_config()
VllmConfig("LlamaForCausalLM", model_type="llama", orthorank={"layers": [2]}).try_verify_and_update_config()
"""
    done = plugged(importable, code)
    assert done.stdout == "verified\nverified\n"
    assert "OrthoRankError: the model's configuration has a plan (orthorank)" in done.stderr
    assert "set architectures to ['OrthoRankLlamaForCausalLM']" in done.stderr
