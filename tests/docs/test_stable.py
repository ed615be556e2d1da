"""What is stable is what the page says, and what is documented is stable."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orthorank.serving.vllm import counts, hooks, rules

ROOT = Path(__file__).parents[2]
STABLE = (ROOT / "docs" / "stable.md").read_text(encoding="utf-8")
NAMED = re.findall(r"^\| `(orthorank[\w.]*)` \|", STABLE, flags=re.MULTILINE)
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md"]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
PACKAGES = ("orthorank", "orthorank_kernels")


def found(path: str) -> Any:
    """The object of a dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


ROOMS = [path for path in NAMED if (ROOT / path.replace(".", "/") / "__init__.py").exists()]
ALONE = [path for path in NAMED if path not in ROOMS]


def code_of(page: Path) -> Iterator[str]:
    """The Python of a page or an example."""
    text = page.read_text(encoding="utf-8")
    yield from [text] if page.suffix == ".py" else re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def paths_of(code: str) -> Iterator[str]:
    """What ``code`` takes from the packages: ``orthorank.apply``, of an import or of an attribute."""
    names: dict[str, str] = {"orthorank": "orthorank"}  # later blocks of a page go on with an import of an earlier one
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in PACKAGES:
                    names[alias.asname or alias.name] = alias.name
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in names:
            yield f"{names[node.value.id]}.{node.attr}"


def is_stable(path: str) -> bool:
    room, _, name = path.rpartition(".")
    return path in NAMED or (room in ROOMS and name in importlib.import_module(room).__all__)


DOCUMENTED = sorted(
    {(path, page.name) for page in [*PAGES, *EXAMPLES] for code in code_of(page) for path in paths_of(code)}
)


def test_the_page_names_rooms_and_what_they_hand_on_is_there() -> None:
    assert {"orthorank", "orthorank_kernels", "orthorank.packed", "orthorank.search"} <= set(ROOMS)
    for room in ROOMS:
        module = importlib.import_module(room)
        assert len(module.__all__) == len(set(module.__all__)), room
        for name in module.__all__:
            assert getattr(module, name) is not None, f"{room}.{name}"
            assert name in dir(module)
    for path in ALONE:
        assert found(path).__doc__, path


def test_what_servers_and_their_clients_go_by_is_named() -> None:
    """Counters, what requests may say, and what every worker answers to: the page has all, and no others."""
    names = {f"{metric.name}_total" for metric in counts.METRICS} | {rules.DENSE, rules.PROMPT_TOKENS}
    names |= set(re.findall(r"WorkerBase\.(\w+) =", inspect.getsource(hooks.watch_weights.__wrapped__)))
    (line,) = re.findall(r"^- vLLM.*?(?=^- )", STABLE, flags=re.MULTILINE | re.DOTALL)
    assert set(re.findall(r"`(orthorank_\w+)`", line)) == names


def test_what_the_documentation_imports_is_stable() -> None:
    assert len(DOCUMENTED) > 25
    assert {"README.md", "kernels.md", "own_family.py", "paged_layer.py"} <= {page for _, page in DOCUMENTED}
    assert not [f"{page}: {path}" for path, page in DOCUMENTED if not is_stable(path)]


def test_code_that_imports_what_is_private_is_seen() -> None:
    code = "import orthorank_kernels as ok\nfrom orthorank.families.parts import Norm\nok.dispatch\northorank.apply"
    assert {path: is_stable(path) for path in paths_of(code)} == {
        "orthorank.families.parts.Norm": False,
        "orthorank_kernels.dispatch": False,
        "orthorank.apply": True,
    }


def reference() -> list[str]:
    return [
        path for page in PAGES for path in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


@pytest.mark.parametrize("path", reference())
def test_what_the_reference_shows_is_handed_on_by_a_stable_room(path: str) -> None:
    name = path.rpartition(".")[2]
    rooms = [importlib.import_module(room) for room in ROOMS]
    handed_on = [room.__name__ for room in rooms if name in room.__all__ and getattr(room, name) is found(path)]
    assert handed_on or path in ALONE


MADE_BY_US = ("Handle",)


def public() -> Iterator[tuple[str, Any]]:
    """Functions, and classes that users make themselves, of all stable rooms."""
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            value = getattr(module, name)
            made = inspect.isclass(value) and not (issubclass(value, BaseException) or name in MADE_BY_US)
            if inspect.isroutine(value) or made:
                yield f"{room}.{name}", value


@pytest.mark.parametrize(("path", "value"), list(public()), ids=[path for path, _ in public()])
def test_every_parameter_is_explained(path: str, value: Any) -> None:
    parameters = [name for name in inspect.signature(value).parameters if name not in ("args", "kwargs")]
    doc = inspect.getdoc(value) or ""
    explained = re.search(r"(?:Args|Attributes):\n(.*?)(?:\n\n *[A-Z]\w+:\n|\Z)", doc, re.DOTALL)
    text = explained[1] if explained else ""
    # "name:", "name, other:", "(name)" or ``name``: a word of the text that happens to be its name is not enough.
    said = [name for name in parameters if re.search(rf"(?<![\w.]){name}(?=[:,`)])", text)]
    assert said == parameters, f"{path} does not explain {sorted(set(parameters) - set(said))}"


@pytest.mark.parametrize("name", ["OrthoRankConfig", "apply", "register_family", "check_family"])
def test_what_a_user_begins_with_is_on_the_front_page(name: str) -> None:
    assert name in importlib.import_module("orthorank").__all__
