"""The output folder of a search: what it may overwrite, and what a continued search must have in common with it.

``search.json`` says what is searched, once, at the beginning, and gets the results at the end; ``search-state.json``
holds the losses and is replaced in one step after every evaluation; ``orthorank.json`` is the plan.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError
from orthorank.common.files import read_json, user_path, writable_folder, write_json
from orthorank.config import FILE_NAME
from orthorank.plan_checks import shown

if TYPE_CHECKING:
    pass

SEARCH, STATE = "search.json", "search-state.json"
FORMAT = 1


class Folder:
    """The output folder.

    Args:
        path: where it is. Nothing is touched before `claim`.
    """

    def __init__(self, path: Path) -> None:
        self.path = user_path("output", path)

    @property
    def state(self) -> Path:
        """The file with the losses so far."""
        return self.path / STATE

    @property
    def plan(self) -> Path:
        """The plan's file."""
        return self.path / FILE_NAME

    def claim(self, resume: bool) -> None:
        """Make the folder if it is not there; ``resume``: whether files of an earlier search may be in it.

        Raises:
            OrthoRankError: it cannot be written to, or it holds a search or a plan and ``resume`` is False.
        """
        found = [name for name in (SEARCH, STATE, FILE_NAME) if (self.path / name).exists()]
        if found and not resume:
            raise OrthoRankError(
                f"output folder {str(self.path)!r} has an earlier result ({', '.join(found)}), which is not "
                "overwritten; go on with that search by adding --resume, or name another folder with --output"
            )
        writable_folder(self.path)

    def open(self, identity: dict[str, Any]) -> bool:
        """Note what is searched, or check that the earlier search was the same.

        Returns:
            Whether there is a state to go on with.

        Raises:
            OrthoRankError: the folder holds another search; the message names the first difference.
        """
        for part in self.path.glob("*.[0-9]*.part"):  # what a killed process left behind
            part.unlink(missing_ok=True)
        before = self._identity()
        if before is None:
            if self.plan.exists():
                raise OrthoRankError(
                    f"{self.plan} is a plan without the search that made it, so there is nothing to resume; name "
                    "another folder with --output"
                )
            self.state.unlink(missing_ok=True)
            self.write(identity, None)
            return False
        now = json.loads(json.dumps(identity))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise OrthoRankError(
                    f"{self.path / SEARCH} is of another search: its {name} is {_short(before.get(name))} and now it "
                    f"is {_short(now.get(name))}; resume with the same options, or name another folder with --output"
                )
        return self.state.exists()

    def write(self, identity: dict[str, Any], results: dict[str, Any] | None) -> None:
        """What is searched, and what came out; None: it is not finished."""
        write_json(self.path / SEARCH, {"format": FORMAT, "search": identity, "results": results})

    def _identity(self) -> dict[str, Any] | None:
        file = self.path / SEARCH
        try:
            value = read_json(file)
            format_, search = value["format"], value["search"]
        except FileNotFoundError:
            return None
        except OSError as error:
            raise OrthoRankError(f"{file} cannot be read: {error.strerror}") from error
        except (ValueError, TypeError, KeyError) as error:
            raise OrthoRankError(f"{file} is no record of a search; name another folder with --output") from error
        if type(format_) is int and format_ != FORMAT:  # before what such a format may hold is judged by this one
            raise OrthoRankError(
                f"{file} has format {shown(format_)} and this version reads {FORMAT}; go on with the version that "
                "wrote it, or name another folder with --output"
            )
        if type(format_) is not int or not isinstance(search, dict):
            raise OrthoRankError(f"{file} is no record of a search; name another folder with --output")
        return search


def _short(value: Any) -> str:
    words = json.dumps(value)
    return words if len(words) <= 80 else f"{words[:77]}..."
