"""For the documentation site: doctests, and tables drawn with letters, are shown as they are."""

import re
from typing import Any

import griffe

_BARE = re.compile(r"(?m)^>>> .*(?:\n(?!\n).*)*(?:\n\n>>> .*(?:\n(?!\n).*)*)*")
_TABLE = re.compile(r"(?m)^=+(?: +=+)+\n(?:.*\n)+?=+(?: +=+)+\n(?:(?:.+\n)+?=+(?: +=+)+$)?")


class Examples(griffe.Extension):
    """Google's style knows "Examples" only; "Example", and doctests without a title, would be drawn as quoted text."""

    def on_object(self, *, obj: Any, **_: Any) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = _TABLE.sub(lambda table: f"```text\n{table.group().strip()}\n```\n", text)
            obj.docstring.value = _BARE.sub(_titled, text)


def _titled(block: re.Match[str]) -> str:
    return "Examples:\n" + "\n".join(f"    {line}" if line else line for line in block.group().splitlines())
