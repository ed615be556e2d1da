"""How far a distillation is, in a file from which it goes on."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from orthorank.common.errors import OrthoRankError, difference, shown
from orthorank.common.files import from_json, write_bytes

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each tensor


class DistillProgress:
    """The state of a run.

    Args:
        identity: of the run, see `orthorank.calibration.progress.identity_of`.
        file: gets the state; None: nothing does. parts: the tensors that are trained, by layer and name.
    """

    def __init__(self, identity: dict[str, Any], file: Path | None, parts: dict[tuple[int, str], Tensor]) -> None:
        self.identity, self.file, self.parts = identity, file, parts

    def save(self, optimizer: torch.optim.Adam, losses: list[float]) -> None:
        """Write the file, replaced in one step."""
        if self.file is None:
            return
        from safetensors.torch import save

        tensors = {}
        for (layer, name), part in self.parts.items():
            tensors[f"{layer}.{name}"] = part.detach().cpu()
            for moment in MOMENTS:
                tensors[f"{layer}.{name}.{moment}"] = optimizer.state[part][moment].cpu()
        said = {"identity": self.identity, "losses": losses}
        write_bytes(self.file, save(tensors, {"distilling": json.dumps(said)}))

    def load(self, optimizer: torch.optim.Adam) -> list[float]:
        """Take up what the file holds; the losses of the steps done, none where there is no file.

        Raises:
            OrthoRankError: it is of another run, or broken.
        """
        if self.file is None or not self.file.exists():
            return []
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.file, framework="pt") as opened:
                said = from_json(opened.metadata()["distilling"])
                before, losses = said["identity"], said["losses"]
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise OrthoRankError(f"{self.file} is no record of an unfinished distillation; delete it") from error
        now = json.loads(json.dumps(self.identity))
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                raise OrthoRankError(
                    f"{self.file} is of another distillation: "
                    f"{difference(name, shown(before.get(name)), shown(now.get(name)))}; go on with the same model, "
                    "plan, texts and options, or delete it"
                )
        for (layer, name), part in self.parts.items():
            with torch.no_grad():
                part.copy_(tensors[f"{layer}.{name}"])
            state = {moment: tensors[f"{layer}.{name}.{moment}"].to(part.device) for moment in MOMENTS}
            optimizer.state[part] = {"step": torch.tensor(float(len(losses))), **state}
        return losses
