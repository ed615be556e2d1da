"""The house: which room may import which. Every import counts, lazy and type-only ones too.

A room is a folder of a package, or a file that lies beside the folders. Rooms of one line below may not import each
other, and no room imports one above it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the top to the ground.
ARROWS = {
    "orthorank": [
        {"__main__"},
        {"cli"},
        {"commands"},
        {"demo", "reproduce"},
        {"analysis", "report"},
        {"search"},
        {"calibration"},
        {"evaluation"},
        {"speed"},
        {"stack"},
        {"serving"},
        {"export", "models", "packed"},
        {"hf"},
        {"calls", "families"},
        {"plans"},
        {"config"},
        {"plan_files"},
        {"plan_checks"},
        {"correction"},
        {"common"},
    ],
    "orthorank_kernels": [
        {"__main__"},
        {"cli"},
        {"tuning", "warmup"},
        {"ops", "support"},
        {"pytorch", "triton"},
        {"reference"},
        {"launch_plan"},
        {"settings"},
        {"counts", "dispatch", "hashing", "layout"},
        {"checks", "launch_notes", "op"},
        {"launch_trace"},
        {"launch_numbers"},
        {"_version", "callers", "remedies"},
    ],
}
PACKAGES = sorted(ARROWS)


def name_of(path: Path) -> str:
    """The dotted name of a module's file."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")}


def imports_of(name: str) -> set[str]:
    """The modules of both packages that ``name`` imports, anywhere in its text. (Relative imports are not used.)"""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: imports are written in full"
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {module for module in found if module in MODULES} - {name}


IMPORTS = {name: imports_of(name) for name in MODULES}


def room_of(name: str) -> str:
    """The second part of a module's name; empty for a package's own ``__init__``."""
    return ".".join(name.split(".")[1:2])


def level_of(name: str) -> int:
    """How far a room is from the ground."""
    floors = ARROWS[name.partition(".")[0]]
    return next(len(floors) - number for number, rooms in enumerate(floors) if room_of(name) in rooms)


def circles(edges: dict[str, set[str]]) -> Iterator[list[str]]:
    """The nodes from which one comes back to where one began."""
    for start in sorted(edges):
        seen, ahead = set(), [start]
        while ahead:
            fresh = edges.get(ahead.pop(), set()) - seen
            if start in fresh:
                yield [start, *sorted(seen)]
                break
            seen |= fresh
            ahead += fresh


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_its_place(package: str) -> None:
    rooms = {room_of(name) for name in MODULES if name.partition(".")[0] == package} - {""}
    assert rooms == set().union(*ARROWS[package])


def test_the_kernels_do_not_know_the_method() -> None:
    assert not [
        name
        for name, found in IMPORTS.items()
        if name.startswith("orthorank_kernels") and any(module.partition(".")[0] == "orthorank" for module in found)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_the_arrow_runs_one_way(package: str) -> None:
    wrong = [
        f"{name} imports {module}"
        for name, found in sorted(IMPORTS.items())
        for module in sorted(found)
        if name.partition(".")[0] == module.partition(".")[0] == package
        and room_of(name)
        and room_of(name) != room_of(module)
        and (not room_of(module) or level_of(name) <= level_of(module))
    ]
    assert not wrong


def test_a_package_in_front_is_imported_by_nothing_behind_it() -> None:
    """`orthorank` hands names on; what is inside takes them from where they are."""
    assert not [name for name, found in IMPORTS.items() if {"orthorank"} & found and name.startswith("orthorank.")]


def test_the_packages_know_nothing_of_what_is_not_in_the_wheel() -> None:
    outside = {folder.name for folder in ROOT.iterdir() if any(folder.glob("*.py"))} - set(PACKAGES)
    assert "contrib" in outside
    for name, path in MODULES.items():
        nodes = list(ast.walk(ast.parse(path.read_text())))
        found = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        found |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not {module.partition(".")[0] for module in found} & outside, name


def test_no_module_is_in_a_circle() -> None:
    inside = {name: {module for module in found if room_of(module)} for name, found in IMPORTS.items()}
    assert not [" -> ".join(circle) for circle in circles(inside)]


def test_the_reference_and_the_kernels_are_strangers() -> None:
    for one, other in (
        ("reference", "triton"),
        ("reference", "pytorch"),
        ("triton", "reference"),
        ("triton", "pytorch"),
    ):
        assert not [
            f"{name} imports {module}"
            for name, found in IMPORTS.items()
            for module in found
            if name.startswith(f"orthorank_kernels.{one}") and module.startswith(f"orthorank_kernels.{other}")
        ]
