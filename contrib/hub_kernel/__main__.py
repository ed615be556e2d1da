"""Write `orthorank_kernels` as a noarch kernel for Hugging Face `kernels` (0.17):

    python -m contrib.hub_kernel FOLDER

    FOLDER/build.toml                       of kernel-builder, edition 5
    FOLDER/torch-ext/orthorank_kernels/     the sources that it builds from
    FOLDER/build/torch-{cpu,cuda,rocm}/     what `kernels` loads, each with its metadata.json

`kernels` loads a folder under a name of its own, several versions side by side. So in the copy the package's imports of
itself are relative, and its operators are in a namespace of their own, named after backend and sources.
"""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

from orthorank_kernels._version import __version__

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "orthorank_kernels"
LAYERS = Path(__file__).with_name("layers.py")
NAME = "orthorank-kernels"
BACKENDS = ("cpu", "cuda", "rocm")
VERSION = 1  # of the kernel, which those who load it name: another one where its functions change
IMPORT = re.compile(r"^(\s*)from orthorank_kernels(?:\.([\w.]+))? import ", flags=re.MULTILINE)
NAMESPACE = 'NAMESPACE = "orthorank_kernels"\n'
LEFT_OUT = ("__main__.py", "cli.py")  # no command line
BUILD = f"""[general]
name = "{NAME}"
version = {VERSION}
edition = 5
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[general.hub]
repo-id = "REPO_ID"

[torch-noarch]
pyext = ["json", "py"]
"""


def build(folder: Path) -> Path:
    """Write all of it into ``folder``, which is made anew, and return it.

    Raises:
        ValueError: ``folder`` holds something that this command has not written; nothing is changed then.
    """
    ours = folder / "build.toml"
    if folder.exists() and not (folder.is_dir() and (not any(folder.iterdir()) or is_ours(ours))):
        raise ValueError(
            f"{folder} is there and is no kernel that this command wrote (no build.toml of {NAME} is in it); it would "
            "be deleted: name an empty folder or a new one"
        )
    files = sources()
    text = "".join(f"{name}\n{content}" for name, content in sorted(files.items()))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    shutil.rmtree(folder, ignore_errors=True)
    write(folder / "torch-ext" / "orthorank_kernels", files, f"orthorank_kernels_hub_{digest}")
    for backend in BACKENDS:
        identity = f"orthorank_kernels_{backend}_{digest}"
        variant = folder / "build" / f"torch-{backend}"
        write(variant, files, identity)
        metadata = {
            "id": identity,
            "name": NAME,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    (folder / "build.toml").write_text(BUILD, encoding="utf-8")
    return folder


def is_ours(build_toml: Path) -> bool:
    """Whether the file is what `build` writes, whatever repository was put into it."""
    return build_toml.is_file() and f'name = "{NAME}"' in build_toml.read_text(encoding="utf-8")


def sources() -> dict[str, str]:
    """Each file of the kernel by its path, with relative imports."""
    found = {str(path.relative_to(SOURCE)): path for end in ("py", "json") for path in SOURCE.rglob(f"*.{end}")}
    files = {name: path.read_text(encoding="utf-8") for name, path in found.items() if name not in LEFT_OUT}
    files["layers.py"] = LAYERS.read_text(encoding="utf-8")
    files["__init__.py"] += "\nfrom orthorank_kernels import layers  # noqa: E402, F401\n"
    return {name: relative(name, content) if name.endswith(".py") else content for name, content in files.items()}


def relative(name: str, content: str) -> str:
    """The file ``name`` of the package, with relative imports of its other files.

    >>> relative("ops/rows.py", "from orthorank_kernels import op as _library")
    'from .. import op as _library'
    >>> relative("op.py", "    from orthorank_kernels.triton.rows import gather_rows")
    '    from .triton.rows import gather_rows'
    """
    dots = "." * (name.count("/") + 1)
    return IMPORT.sub(lambda found: f"{found[1]}from {dots}{found[2] or ''} import ", content)


def write(folder: Path, files: dict[str, str], namespace: str) -> None:
    """The ``files``, with their operators in ``namespace``."""
    assert NAMESPACE in files["op.py"], "op.py says its namespace in another way"
    named = files | {"op.py": files["op.py"].replace(NAMESPACE, f'NAMESPACE = "{namespace}"\n')}
    for name, content in named.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m contrib.hub_kernel FOLDER")
    try:
        print(f"orthorank-kernels {__version__} as a kernel for the Hub: {build(Path(sys.argv[1]))}")
    except (OSError, ValueError) as error:
        sys.exit(f"hub_kernel: {error}")
