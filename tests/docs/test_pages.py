"""The documentation without its site: pages are in the navigation, links lead somewhere, names and commands exist."""

import importlib
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def nav_files(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [file for value in values for file in nav_files(value)]  # type: ignore[union-attr]


def test_every_page_is_in_the_navigation_once() -> None:
    nav = nav_files(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    assert sorted(nav) == [page.name for page in PAGES]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [target for target in LINK.findall(page.read_text()) if "://" not in target]
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []


def test_the_front_page_shows_the_readmes_first_example() -> None:
    """That one runs as a slow test, which compares what it prints: the page holds the same code and output."""
    readme, front = (
        re.findall(r"```\w*\n.*?```", page.read_text(), re.DOTALL)
        for page in (ROOT / "README.md", ROOT / "docs" / "index.md")
    )
    at = next(number for number, block in enumerate(readme) if "load_model" in block)
    assert readme[at : at + 2] == front[:2]


def test_the_code_of_every_page_is_run_by_a_test() -> None:
    """Each page with Python is named by a test file that executes what it finds there; index.md by the test above."""
    tests = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    running = "\n".join(text for text in tests if "exec(" in text)
    with_code = [page.name for page in PAGES if "```python" in page.read_text(encoding="utf-8")]
    assert len(with_code) > 9
    assert [name for name in with_code if name != "index.md" and f'"{name}"' not in running] == []


def cells(row: str) -> int:
    """Of a line of a table: bars that are not escaped part them, also within backticks."""
    return len(re.findall(r"(?<!\\)\|", row.strip().strip("|"))) + 1


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_tables_render(page: Path) -> None:
    """Python-Markdown, which makes the site, asks for an empty line before a table; each row has the header's cells."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = text.splitlines()
    for at, line in enumerate(lines):
        if not re.fullmatch(r"\|( ?:?-+:? ?\|)+", line.strip()):
            continue
        header = lines[at - 1]
        assert at < 2 or not lines[at - 2].strip(), f"no empty line before the table {header!r}"
        for row in lines[at + 1 :]:
            if not row.startswith("|"):
                break
            assert cells(row) == cells(header), f"{row!r} has other cells than {header!r}"


def test_the_bound_on_a_speed_up_has_one_name() -> None:
    sources = [*PAGES, ROOT / "README.md", *(ROOT / "orthorank").rglob("*.py"), *(ROOT / "orthorank").rglob("*.j2")]
    assert [
        str(file) for file in sources if "flop-ideal" in file.read_text().lower().replace("flop ideal", "flop-ideal")
    ] == []


def test_documented_names_exist() -> None:
    names = [name for page in PAGES for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)]
    assert len(names) > 25
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert found.__doc__, name


def test_the_page_of_commands_has_both_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    shown = importlib.import_module("hooks").commands()
    assert "\n## orthorank search\n" in shown or "\n### orthorank search\n" in shown
    assert "\n## orthorank-kernels tune\n" in shown
    assert "--compile TARGET" in shown


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    """``orthorank search --sparsity ...`` in a page is a command with these options."""
    import typer

    from orthorank.cli import _app

    root = typer.main.get_command(_app())
    for line in re.findall(r"^orthorank (.+)$", page.read_text(), re.MULTILINE):
        words = line.partition("#")[0].split()
        command = root
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]
        assert command is not root, line
        if command.name == "lm-eval":  # passes everything on
            continue
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        unknown = [word.partition("=")[0] for word in words if word.startswith("--")]
        assert [word for word in unknown if word not in known] == [], line
