"""Writing results: into a folder that is known to be writable, each file replaced in one step."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from orthorank.errors import OrthoRankError


def user_path(name: str, path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` written out.

    Raises:
        OrthoRankError: it begins with the home of a user that does not exist; ``name`` is the argument's.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OrthoRankError(f"{name} is {str(path)!r}: there is no such home directory") from error


def writable_folder(path: str | os.PathLike[str]) -> Path:
    """Make the folder ``path`` if it is not there, and check that files can be written into it.

    Raises:
        OrthoRankError: it cannot be made or written to.
    """
    folder = user_path("output", path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".orthorank-"):
            pass
    except (FileExistsError, NotADirectoryError):
        raise OrthoRankError(f"output is {str(path)!r}, which is not a folder; name a folder to write into") from None
    except OSError as error:
        raise OrthoRankError(f"output folder {str(path)!r} cannot be written to: {error.strerror}") from error
    return folder


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    write_bytes(path, text.encode("utf-8", errors="replace"))  # file names need not be UTF-8


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step, as `write_text` does."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OrthoRankError(f"{path} cannot be written: {error.strerror}") from error
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, in one step. Infinite and NaN figures become null: JSON has no name for them.

    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "figures.json"
    >>> write_json(file, {"loss": float("inf"), "layers": (1, 2)})
    >>> json.loads(file.read_text())
    {'loss': None, 'layers': [1, 2]}
    """
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """``value`` as JSON can hold it: None in place of infinite and NaN figures, lists in place of tuples.

    >>> finite({"losses": (1.5, float("nan"))})
    {'losses': [1.5, None]}
    """
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value
