"""Files: JSON that says each thing once, and results, each file replaced in one step."""

import contextlib
import errno
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError, type_of

_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP)  # no file can be there, whatever is asked of it


def user_path(name: str, path: str | os.PathLike[str]) -> Path:
    """``path`` with ``~`` written out, whether there is a file or not.

    Raises:
        OrthoRankError: it is no path, begins with the home of a user that does not exist, or no file can have such a
            name; ``name`` is the argument's.

    >>> user_path("plan", "x" * 5000)
    Traceback (most recent call last):
        ...
    orthorank.common.errors.OrthoRankError: plan is 'xxxxxxxxxxxxxxxxxxxxxxxx...' (5000 characters), which cannot be \
the path of a file: File name too long
    """
    try:
        found = Path(path).expanduser()
        os.lstat(found)
    except RuntimeError as error:
        raise OrthoRankError(f"{name} is {str(path)!r}: there is no such home directory") from error
    except TypeError as error:
        raise OrthoRankError(f"{name} is {type_of(path)}; it must be the path of a file or folder") from error
    except ValueError as error:  # a zero byte
        raise OrthoRankError(f"{name} is {_short(path)}, which cannot be the path of a file: {error}") from error
    except OSError as error:
        if error.errno in _NO_NAME:
            reason = f"which cannot be the path of a file: {error.strerror}"
            raise OrthoRankError(f"{name} is {_short(path)}, {reason}") from error
    return found


def _short(path: str | os.PathLike[str]) -> str:
    said = str(path)
    return repr(said) if len(said) <= 200 else f"{said[:24] + '...'!r} ({len(said)} characters)"


def read_text(name: str, path: str | os.PathLike[str]) -> str:
    """What the UTF-8 file ``path`` holds, without a byte order mark, its line ends as they are.

    Raises:
        OrthoRankError: it cannot be read, or is something else; ``name`` is the argument's.
    """
    file = user_path(name, path)
    if file.is_dir():
        raise OrthoRankError(f"{name} {str(path)!r} is a folder; name a UTF-8 text file")
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise OrthoRankError(f"{name} {str(path)!r} cannot be read: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise OrthoRankError(f"{name} {str(path)!r} is not a UTF-8 text file (byte {error.start})") from error


def read_json(file: Path, most: int | None = None) -> Any:
    """What the JSON file ``file`` holds.

    Args:
        most: bytes that it may have; None: any number.

    Raises:
        OSError: it cannot be read, is larger, or is a pipe or a device, which might never end.
        ValueError: it is not JSON in UTF-8, or an object in it has a key twice: which of the two counts is not known.

    >>> from_json('{"layers": [1], "layers": [2]}')
    Traceback (most recent call last):
        ...
    ValueError: the key 'layers' is there twice
    """
    kind = os.stat(file).st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # opening a folder fails by itself
        raise OSError(errno.EINVAL, "it is a pipe or a device; give an ordinary file")
    with file.open("rb") as opened:
        content = opened.read(-1 if most is None else most + 1)
    if most is not None and len(content) > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes")
    return from_json(content.decode("utf-8-sig"))


def from_json(text: str | bytes) -> Any:
    """What the JSON ``text`` holds; raises ValueError as `read_json` does."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice")
    return found


def writable_folder(path: str | os.PathLike[str], name: str = "output") -> Path:
    """Make the folder ``path`` if it is not there, and check that files can be written into it.

    Args:
        name: of the argument, for the error.

    Raises:
        OrthoRankError: it cannot be made or written to.
    """
    folder = user_path(name, path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".orthorank-"):
            pass
    except (FileExistsError, NotADirectoryError):
        raise OrthoRankError(f"{name} is {str(path)!r}, which is not a folder; name a folder to write into") from None
    except OSError as error:
        raise OrthoRankError(f"{name} folder {str(path)!r} cannot be written to: {error.strerror}") from error
    return folder


# What search, calibrate and correct write into their folders, hours of work some of it.
KEPT = (
    "search.json",
    "search-state.json",
    "correct-state.safetensors",
    "distill-state.safetensors",
    "orthorank.json",
    "correction.safetensors",
)


def check_free(path: str | os.PathLike[str], remedy: str = "") -> None:
    """No plan, search or fit is in the folder ``path``, which need not be there.

    Args:
        remedy: what to do beside naming another folder.

    Raises:
        OrthoRankError: one is.
    """
    folder = user_path("output", path)
    if found := [name for name in KEPT if (folder / name).exists()]:
        raise OrthoRankError(
            f"output folder {str(folder)!r} has an earlier result ({', '.join(found)}), which is not overwritten; "
            f"{remedy}name another folder with --output"
        )


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one, never a part."""
    write_bytes(path, text.encode("utf-8", errors="replace"))  # file names need not be UTF-8


def write_bytes(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` in one step, as `write_text` does. Nothing else is left behind when it fails."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # on a disk that fails, this may fail, too
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OrthoRankError(f"{path} cannot be written: {error.strerror}") from error
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
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and value not in (float("inf"), float("-inf")) and value == value:
        return value
    return None if isinstance(value, float) else value
