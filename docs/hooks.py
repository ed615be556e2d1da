"""For the documentation site: the command line's help as a page, and links that leave the site as plain names."""

import re
from typing import Any

COMMANDS = "<!-- commands -->"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by MkDocs for every page."""
    if COMMANDS in markdown:
        markdown = markdown.replace(COMMANDS, commands())
    # `[text](../examples/x.py)`: a file of the repository, which the site does not hold
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)


def commands() -> str:
    """Each command's help, as the terminal shows it."""
    import typer

    from orthorank.cli import _app

    return "\n\n".join(_help(typer.main.get_command(_app()), "orthorank", level=2))


def _help(command: Any, name: str, level: int) -> list[str]:
    context = command.make_context(name, [], resilient_parsing=True)
    parts = [f"{'#' * level} {name}", f"```text\n{command.get_help(context).strip()}\n```"]
    for child in getattr(command, "commands", {}).values():
        parts += _help(child, f"{name} {child.name}", level + 1 if level < 3 else level)
    return parts
