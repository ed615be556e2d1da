"""`orthorank_kernels` as a kernel of Hugging Face `kernels`: beside the installed package, in one process.

`make hub-kernel` runs all of it with `kernels` itself; without it the folder is loaded as `kernels` loads one.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import orthorank_kernels as installed
from contrib.hub_kernel.__main__ import BACKENDS, build

ALONE = """
import importlib.util, json, sys
folder = sys.argv[1] + "/build/torch-cpu"
identity = json.load(open(folder + "/metadata.json"))["id"]
spec = importlib.util.spec_from_file_location(identity, folder + "/__init__.py")
hub = sys.modules[identity] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hub)
import torch
scores = torch.rand(2, 40)
hub.select_tokens(scores, 5)
assert not any(name.partition(".")[0] == "orthorank_kernels" for name in sys.modules), "it needs the package"
import orthorank_kernels as installed
assert torch.equal(hub.select_tokens(scores, 5).positions, installed.select_tokens(scores, 5).positions)
x, weight = torch.randn(2, 9, 16), torch.rand(16)
assert torch.equal(hub.rms_norm_score(x, weight, 1e-6).normed, installed.rms_norm_score(x, weight, 1e-6).normed)
spaces = [getattr(torch.ops, name) for name in (identity, "orthorank_kernels")]
assert spaces[0].select_tokens.default is not spaces[1].select_tokens.default
print(sorted(set(hub.__all__) ^ set(installed.__all__)), hub.layers.RMSNorm.__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("hub") / "kernel")


def test_it_needs_nothing_of_the_installed_package(folder: Path, tmp_path: Path) -> None:
    root = str(Path(installed.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": root}
    line = [sys.executable, "-c", ALONE, str(folder)]
    run = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "[] RMSNorm\n"), run.stderr


def test_a_folder_of_other_things_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no kernel that this command wrote"):
        build(tmp_path)
    with pytest.raises(ValueError, match="is no kernel that this command wrote"):
        build(tmp_path / "thesis.txt")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    again = build(build(tmp_path / "kernel"))
    assert (again / "build.toml").is_file()


def test_what_is_written(folder: Path) -> None:
    """A variant of each backend, with names of their own; no import of the package by its name; the settings."""
    identities = set()
    for variant in (folder / "build").iterdir():
        metadata = json.loads((variant / "metadata.json").read_text())
        assert variant.name == f"torch-{metadata['backend']['type']}"
        assert f'NAMESPACE = "{metadata["id"]}"\n' in (variant / "op.py").read_text()
        assert metadata["id"].isidentifier()
        identities.add(metadata["id"])
        for file in variant.rglob("*.py"):
            code = re.sub(r"^\s*>>> .*$", "", file.read_text(), flags=re.MULTILINE)
            assert not re.search(r"^\s*(from|import) orthorank", code, flags=re.MULTILINE), file
        assert (variant / "settings" / "configs" / "select_tokens.default.json").exists()
    assert len(identities) == len(BACKENDS)
    assert (folder / "torch-ext" / "orthorank_kernels" / "layers.py").exists()
    assert "[torch-noarch]" in (folder / "build.toml").read_text()


class Norm(nn.Module):
    """As a model has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(16)), 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states * torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed


class Gate(nn.Module):
    """As a model has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return nn.functional.silu(gate) * up


def test_kernels_loads_it(folder: Path) -> None:
    kernels = pytest.importorskip("kernels")
    hub = kernels.get_local_kernel(folder, backend="cpu")
    scores = torch.rand(2, 40)
    assert hub.__name__ != "orthorank_kernels"
    assert torch.equal(hub.select_tokens(scores, 5).positions, installed.select_tokens(scores, 5).positions)
    assert kernels.get_loaded_kernels()[-1].metadata.version == 1


@pytest.mark.parametrize("shape", [(2, 9, 16), (9, 16), (2, 3, 4, 16)], ids=str)
def test_kernelize_takes_its_layers(folder: Path, shape: tuple[int, ...]) -> None:
    """Layers of a model get its forwards, which give the same, gradients too."""
    kernels = pytest.importorskip("kernels")
    names = {Norm: "RMSNorm", Gate: "SiluAndMul"}
    for cls, name in names.items():
        kernels.replace_kernel_forward_from_hub(cls, name)
    repositories = {name: {"cpu": kernels.LocalLayerRepository(folder, layer_name=name)} for name in names.values()}
    model, x = nn.Sequential(Norm(), Gate()), torch.randn(shape, requires_grad=True)
    expected = model(x)
    (gradient,) = torch.autograd.grad(expected.sum(), x)
    with kernels.use_kernel_mapping(repositories):
        mode = kernels.Mode.TRAINING | kernels.Mode.TORCH_COMPILE
        kernelized = kernels.kernelize(model, mode=mode, device="cpu", use_fallback=False)
    assert all("forward" in vars(module) for module in kernelized)
    found = kernelized(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x)[0], gradient)
