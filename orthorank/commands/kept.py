"""Rows that a command has measured: kept in its output folder one by one, found again by a run that goes on."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import finite
from orthorank.evaluation.answer_cache import as_before, owner_of
from orthorank.evaluation.answers import keep, kept_rows


class KeptRows:
    """The rows in the JSONL file ``file``, each by what it depends on; None: rows are not kept."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self._known = {} if file is None else kept_rows(file, "rows", row=dict)

    def row(self, model: Any, plan: Any, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> Any:
        """The row of ``model`` with ``plan`` (None: dense) and ``settings``: the one that is kept, or what ``measure``
        returns, kept from now on.

        Raises:
            OrthoRankError: Ctrl-C was pressed; it says where the rows are.
        """
        owner = owner_of(model, plan, False, settings)
        key, before = (json.dumps(each, sort_keys=True) for each in (owner, as_before(owner)))
        if key not in self._known and before in self._known:
            key = before
        if key not in self._known:
            try:
                self._known[key] = {"key": key, "row": finite(measure())}
            except KeyboardInterrupt:
                if self.file is None:
                    raise
                raise OrthoRankError(
                    f"interrupted; what is measured is in {self.file}: the same command goes on there"
                ) from None
            if self.file is not None:
                keep(self.file, self._known[key])
        return self._known[key]["row"]
