"""What is known of the machine without torch, and the lines that campaigns leave on it for later ones."""

import importlib.metadata
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PACKAGES = ("torch", "triton", "transformers", "numpy")
RECENT = 3600.0  # seconds; an earlier campaign is of the same sitting


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on; "none" for one that is absent."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def commit(folder: Path) -> str:
    """Of the checkout, with "changed" when it is not what was committed; "unknown" without git."""
    try:
        said = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said[0].strip() + (" changed" if said[1].strip() else "")


def folder() -> Path:
    """Where campaigns on this machine leave their lines: in the temporary folder, one for each user."""
    return Path(tempfile.gettempdir()) / f"orthorank-campaigns-{os.getuid()}"


def leave_in(place: Path, name: str) -> list[Path]:
    """The file for the lines of the campaign ``name`` that begins now; none where it cannot be made."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        path = place / f"{time.time():.3f}-{name}.jsonl"
        path.touch()
        return [path]
    except OSError:
        return []


def earlier(place: Path, without: Sequence[Path]) -> list[Path]:
    """Lines of campaigns A of the last hour, the oldest first."""
    if not place.is_dir():
        return []
    found = [path for path in sorted(place.glob("*-A.jsonl")) if path not in without and path.stat().st_size]
    return [path for path in found if time.time() - path.stat().st_mtime < RECENT]
