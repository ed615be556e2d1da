"""What a child process of a campaign is told, as one JSON argument."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """Args:
    outputs: files that get every line, the first one the campaign's results.
    files: folder for what is returned as it is; work: folder for everything else.
    seconds: after so many the process should have ended by itself.
    cuts: what is left out because time is short. dry: on a CPU, tiny, in PyTorch.
    common: fields of every line.
    """

    outputs: list[str]
    files: str
    work: str
    seconds: float
    cuts: list[str] = field(default_factory=list)
    dry: bool = False
    common: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """As an argument of a command line."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> "Job":
        """What `text` wrote."""
        return cls(**json.loads(text))

    def outputs_as_paths(self) -> list[Path]:
        """For `Lines`."""
        return [Path(path) for path in self.outputs]

    @property
    def results(self) -> Path:
        """The campaign's results, those of earlier steps among them."""
        return Path(self.outputs[0])
