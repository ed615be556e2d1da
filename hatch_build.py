"""The README as an index shows it: links that lead into the repository are absolute there."""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface


def with_absolute_links(text: str, home: str) -> str:
    """``text`` with relative links into the repository at ``home``; pictures come raw.

    >>> with_absolute_links("[a](docs/a.md#b) ![p](docs/p.svg) [c](https://c.org) [d](#d)", "https://host")
    '[a](https://host/blob/main/docs/a.md#b) ![p](https://host/raw/main/docs/p.svg) [c](https://c.org) [d](#d)'
    """

    def absolute(match: re.Match[str]) -> str:
        kind = "raw" if match[1] else "blob"
        return f"{match[1]}[{match[2]}]({home}/{kind}/main/{match[3]})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?://|#)([^)]+)\)", absolute, text)


class Readme(MetadataHookInterface):
    """Says what the package's description is; pyproject.toml leaves it open (``dynamic``)."""

    def update(self, metadata: dict[str, Any]) -> None:
        root = Path(self.root)
        home = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Homepage"]
        text = with_absolute_links((root / "README.md").read_text(encoding="utf-8"), home)
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
