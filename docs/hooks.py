"""For the documentation site: version and repository, the command line's help as a page, the paths that users import by
as headings, and links that leave the site as plain names."""

import functools
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

COMMANDS = "<!-- commands -->"
STABLE = Path(__file__).with_name("stable.md")


def on_config(config: Any) -> Any:
    """Called by MkDocs first: which version the pages are of, and where the repository is."""
    root = Path(__file__).resolve().parent.parent
    version = (root / "orthorank_kernels" / "_version.py").read_text(encoding="utf-8").split('"')[1]
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    config.site_name = f"{config.site_name} {version}"
    # Not as repo_url: the theme would ask the host of the repository for its stars at every visit.
    config.nav.append({"Repository": project["urls"]["Homepage"]})
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for every page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    markdown = re.sub(r"^::: (\S+)$", _with_public_heading, markdown, flags=re.MULTILINE)
    # `[text](../examples/x.py)`: a file of the repository, which the site does not hold
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)


def _with_public_heading(shown: re.Match[str]) -> str:
    """An entry of the reference, headed by the path that users import it by."""
    path = public_paths().get(shown[1])
    return f"{shown[0]}\n    options:\n      heading: {path}" if path else shown[0]


@functools.cache
def public_paths() -> dict[str, str]:
    """By where a name is defined: the stable room that hands it on, the shortest first."""
    rooms = re.findall(r"^\| `(\w[\w.]*)` \|", STABLE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for room in sorted(rooms, key=len):
        try:
            module = importlib.import_module(room)
        except ImportError:  # a name by itself, which is its own heading
            continue
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            home = getattr(value, "__module__", None)
            if home is not None:
                found.setdefault(f"{home}.{name}", f"{room}.{name}")
    return found


def commands() -> str:
    """Each command's help, as the terminal shows it."""
    import typer

    from orthorank.cli import _app
    from orthorank_kernels.cli import _parser

    tune = _parser()._subparsers._group_actions[0].choices["tune"]
    kernels = ["## orthorank-kernels tune", f"```text\n{tune.format_help().strip()}\n```"]
    return "\n\n".join(_help(typer.main.get_command(_app()), "orthorank", level=2) + kernels)


def _help(command: Any, name: str, level: int) -> list[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    parts = [f"{'#' * level} {name}", f"```text\n{command.get_help(context).strip()}\n```"]
    for child in getattr(command, "commands", {}).values():
        parts += _help(child, f"{name} {child.name}", level + 1 if level < 3 else level)
    return parts
