"""A plan's files, in a folder or in a repository of the Hugging Face Hub. Only these two are ever read."""

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError, shown
from orthorank.common.files import read_json, user_path
from orthorank.plan_checks import FILE_NAME, MOST_JSON
from orthorank_kernels.callers import levels_to_caller

PUSH = ("repo_id", "token", "private", "revision", "commit_message", "commit_description", "create_pr")


@dataclass(frozen=True)
class Found:
    """A plan's JSON, before anything of it is believed.

    Args:
        name: of the plan, for errors. values: what the JSON holds. source: ``org/name@commit`` of one from the Hub.
        fetch_maps: given the name of the file beside it and the most bytes that it may have, where that is, locally.
    """

    name: str
    values: Any
    source: str | None
    fetch_maps: Callable[[str, int], Path]


def find_plan(path: str | os.PathLike[str], revision: str | None = None, token: str | bool | None = None) -> Found:
    """The plan in a file, a folder, or a repository of the Hub, in this order; of the last are revision and token.

    Raises:
        OrthoRankError: it cannot be read, or is larger than a plan.
    """
    from orthorank.common.hub import Place, fetch, place_of  # a plan that is made here needs no Hub

    file = user_path("plan", path)
    place = place_of(str(path), revision)  # as it was written: "./org/name" is a folder
    if place is None or os.path.lexists(file):
        if revision is not None:
            warnings.warn(
                f"revision is {revision!r} and the plan is read from {file}, a local path, which has no revisions",
                stacklevel=levels_to_caller(),
            )
        file = file / FILE_NAME if file.is_dir() else file
        return Found(str(file), _read(file), None, lambda name, most: file.parent / name)
    file, commit = fetch(place, FILE_NAME, MOST_JSON, token)
    there = Place(place.repo, commit)
    return Found(str(there), _read(file), str(there), lambda name, most: fetch(there, name, most, token)[0])


def _read(file: Path) -> Any:
    try:
        return read_json(file, MOST_JSON)
    except OSError as error:
        raise OrthoRankError(f"no plan can be read at {file}: {error.strerror}; check the path") from error
    except ValueError as error:
        raise OrthoRankError(f"{file} is not a JSON file: {error}; copy or write the plan again") from error


@contextmanager
def naming(plan: str) -> Iterator[None]:
    """Errors inside say which plan they are about."""
    try:
        yield
    except OrthoRankError as error:
        raise OrthoRankError(f"{plan}: {error}") from error


def check_push(push_to_hub: bool, hub: Mapping[str, Any]) -> None:
    """``hub``, what was said of a push, is what a push may be told.

    Raises:
        OrthoRankError: it holds something else, or is for no push.
    """
    if unknown := sorted(set(hub) - set(PUSH)):
        raise OrthoRankError(f"{unknown[0]} is {shown(hub[unknown[0]])}; a push may be told {', '.join(PUSH)}")
    if hub and not push_to_hub:
        raise OrthoRankError(
            f"{next(iter(hub))} is of a push, and push_to_hub is False; set it, or leave the other out"
        )
