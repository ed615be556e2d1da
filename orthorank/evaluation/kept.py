"""Rows that are measured: kept in a JSONL file one by one, found again by a run that goes on."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import finite, from_json
from orthorank.evaluation.answer_cache import as_before, owner_of


def kept_rows(path: Path, what: str = "answers", **fields: type) -> dict[str, dict[str, Any]]:
    """Rows that an earlier run kept, by their key. A last line without its end, of a killed process, is cut off.

    Args:
        path: a file of `keep`; there need be none. what: it is a file of, in the error's words.
        fields: what each row has beside its key, and of which type.

    Raises:
        OrthoRankError: it cannot be read, or holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            os.truncate(path, len(whole))
    except OSError as error:
        raise OrthoRankError(f"{path} cannot be read: {error.strerror}") from error
    known = {}
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = from_json(line.decode("utf-8"))
            known[row["key"]] = row
            if not all(isinstance(row[name], kind) for name, kind in fields.items()):
                raise ValueError("a row has a field of another type")
        except (ValueError, KeyError, TypeError) as error:
            raise OrthoRankError(
                f"{path} is no file of {what} (line {number}); delete it, or name another output folder"
            ) from error
    return known


def keep(path: Path, row: dict[str, Any]) -> None:
    """Add ``row``, which has a ``key``, to the JSONL file ``path``."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
    except OSError as error:
        raise OrthoRankError(f"{path} cannot be written: {error.strerror}") from error


class KeptRows:
    """The rows in the JSONL file ``file``, each by what it depends on; None: they are kept in memory alone.

    ``what``: it is a file of, in the error's words.
    """

    def __init__(self, file: Path | None, what: str = "rows") -> None:
        self.file = file
        self.known = {} if file is None else kept_rows(file, what, row=dict)

    def get(self, key: str, measure: Callable[[], dict[str, Any]], before: str | None = None) -> dict[str, Any]:
        """The row ``key``, or ``before``, as an earlier version called it: one that is kept, or else what ``measure``
        returns, kept from now on.
        """
        if key not in self.known and before is not None and before in self.known:
            key = before
        if key not in self.known:
            self.known[key] = {"key": key, "row": measure()}
            if self.file is not None:
                keep(self.file, self.known[key])
        found: dict[str, Any] = self.known[key]["row"]
        return found

    def of_model(
        self, model: Any, plan: Any, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The row of ``model`` with ``plan`` (None: dense) and ``settings``; as `get`.

        Raises:
            OrthoRankError: Ctrl-C was pressed; it says where the rows are.
        """
        owner = owner_of(model, plan, False, settings)
        key, before = (json.dumps(each, sort_keys=True) for each in (owner, as_before(owner)))
        with nullcontext() if self.file is None else going_on(f"what is measured is in {self.file}"):
            return self.get(key, lambda: finite(measure()), before)


@contextmanager
def going_on(kept: str) -> Iterator[None]:
    """Inside, Ctrl-C is an error that says what is ``kept`` where, and how the run goes on.

    Raises:
        OrthoRankError: Ctrl-C was pressed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise OrthoRankError(f"interrupted; {kept}: the same command goes on there") from None
