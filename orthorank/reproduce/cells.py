"""Cells of the tables: each is computed once, kept in a file of its own, and found there by the next run."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import read_json, write_json


class Cells:
    """Finished cells in a folder, one JSON file each.

    Args:
        folder: where they are; made when the first one is finished.
        common: what all of them depend on, such as the model; a cell of other inputs is computed again.
        config: hash of the model's configuration; a file that names none, of an earlier version, fits all.

    Example:
        >>> import tempfile
        >>> cells = Cells(Path(tempfile.mkdtemp()), {"model": "a"})
        >>> cells.get("sum", {"of": [1, 2]}, lambda: 3), cells.get("sum", {"of": [1, 2]}, lambda: 4)
        (3, 3)
    """

    def __init__(self, folder: Path, common: dict[str, Any], config: str | None = None) -> None:
        self.folder = folder
        self.common = common
        self.config = config
        self.computed = 0
        self.found = 0

    def get(self, name: str, inputs: dict[str, Any], compute: Callable[[], Any], text: str | None = None) -> Any:
        """The value of cell ``name``: from its file if that was made of the same inputs, else ``compute()``, kept.

        Values are what JSON holds; a computed one is returned as its file would give it, so that both are the same.
        A cell of other inputs, as of another model in the same folder, is left as it is: the new one goes beside it.

        Args:
            text: hash of the text that was measured, where ``inputs`` do not say it; a file that names none fits all.
        """
        key = self.key(inputs)
        said = {field: value for field, value in (("text", text), ("config", self.config)) if value is not None}
        others = ([key, text], [key, text, self.config])
        for path in (self.folder / f"{name}{end}.json" for end in ("", *(f"-{self.key(each)}" for each in others))):
            known = self._read(path)
            if known is None:
                break
            if known.get("key") == key and all(known.get(field, value) == value for field, value in said.items()):
                self.found += 1
                return known["value"]
        value = json.loads(json.dumps(compute()))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"key": key, "inputs": inputs, "value": value} | said)
        self.computed += 1
        return self._read(path)["value"]  # type: ignore[index]

    def key(self, inputs: Any) -> str:
        """A hash of ``inputs`` and of what all cells depend on."""
        text = json.dumps([self.common, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    @staticmethod
    def _read(path: Path) -> dict[str, Any] | None:
        try:
            found = read_json(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OrthoRankError(f"{path} cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise OrthoRankError(f"{path} is not a JSON file; delete it, and its cell is computed again") from error
        if not isinstance(found, dict) or not {"key", "value"} <= set(found):
            raise OrthoRankError(f"{path} is no finished cell; delete it, and it is computed again")
        return found
