"""How far maps are fitted, or distilled, in a file from which that goes on."""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orthorank.calibration.fitting import Fitted
from orthorank.calibration.windows import record_of
from orthorank.common.criteria import code_of
from orthorank.common.errors import OrthoRankError, difference, shown
from orthorank.common.files import from_json, write_bytes
from orthorank.config import OrthoRankConfig
from orthorank.correction import LayerMap, name_of, tensors_of
from orthorank.stack.layers import config_fingerprint, model_fingerprint
from orthorank_kernels._version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOMENTS = ("exp_avg", "exp_avg_sq")  # what Adam keeps of each tensor
_FIGURES = ("explained", "ridge", "threshold", "achieved")


def identity_of(model: "PreTrainedModel", input_ids: Tensor, plan: OrthoRankConfig, **settings: Any) -> dict[str, Any]:
    """What decides the maps, and so must not change between the parts of a fit that goes on."""
    bare = dataclasses.replace(plan, correction=None, calibration={}, measured={})
    return {
        "version": __version__,
        "model_fingerprint": model_fingerprint(model),
        "config_fingerprint": config_fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "plan": bare.to_dict(),
        **code_of(plan.criterion),
        **settings,
        **record_of(input_ids),
    }


@contextmanager
def reading(file: Path, what: str) -> Iterator[Any]:
    """``file`` opened, a file of tensors; errors inside say that it is no record of an unfinished ``what``."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise OrthoRankError(f"{file} is no record of an unfinished {what}; delete it to begin anew") from error


def check_same(file: Path, what: str, before: dict[str, Any], identity: dict[str, Any]) -> None:
    """``before``, the identity that ``file`` holds, is that of the ``what`` which goes on; raises if it is not."""
    now = json.loads(json.dumps(identity))
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise OrthoRankError(
                f"{file} is of another {what}: {difference(name, shown(before.get(name)), shown(now.get(name)))}; "
                "go on with the same model, plan, texts and options, or delete it to begin anew"
            )


class FitProgress:
    """The layers that are fitted.

    Args:
        identity: of the fit, see `identity_of`. file: gets each layer as soon as it is fitted; None: nothing does.

    ``batch_size``: windows in one forward, on which the last bits depend; None until the fit knows.
    """

    def __init__(self, identity: dict[str, Any], file: Path | None = None) -> None:
        self.identity, self.file = identity, file
        self.fits: dict[int, Fitted] = {}
        self.batch_size: int | None = None

    @classmethod
    def of(cls, file: Path, identity: dict[str, Any], batch_size: int | None) -> "FitProgress":
        """What ``file`` holds, or, where there is none, the beginning.

        Args:
            batch_size: that was asked for; None: the earlier fit's is taken.

        Raises:
            OrthoRankError: it is of another fit, or broken.
        """
        progress = cls(identity, file)
        if not file.exists():
            return progress
        with reading(file, "fit") as opened:
            said = from_json(opened.metadata()["progress"])
            before, progress.batch_size = said["identity"], said["batch_size"]
            for name, figures in said["layers"].items():
                parts = (opened.get_tensor(name_of(int(name), part)) for part in LayerMap._fields)
                progress.fits[int(name)] = Fitted(LayerMap(*parts), *(figures[each] for each in _FIGURES))
        before |= {"batch_size": progress.batch_size}
        check_same(file, "fit", before, identity | {"batch_size": batch_size or progress.batch_size})
        return progress

    def add(self, layer: int, fitted: Fitted) -> None:
        """Note a layer that is fitted."""
        self.fits[layer] = fitted
        if self.file is None:
            return
        from safetensors.torch import save

        layers = {str(at): {name: getattr(each, name) for name in _FIGURES} for at, each in self.fits.items()}
        said = {"identity": self.identity, "batch_size": self.batch_size, "layers": layers}
        parts = tensors_of({at: each.layer_map for at, each in self.fits.items()})
        tensors = {name: part.cpu() for name, part in parts.items()}
        write_bytes(self.file, save(tensors, {"progress": json.dumps(said)}))


class DistillProgress:
    """The state of a distillation.

    Args:
        identity: of the run, see `identity_of`.
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
        with reading(self.file, "distillation") as opened:
            said = from_json(opened.metadata()["distilling"])
            before, losses = said["identity"], said["losses"]
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  (no mapping)
        check_same(self.file, "distillation", before, self.identity)
        for (layer, name), part in self.parts.items():
            with torch.no_grad():
                part.copy_(tensors[f"{layer}.{name}"])
            state = {moment: tensors[f"{layer}.{name}.{moment}"].to(part.device) for moment in MOMENTS}
            optimizer.state[part] = {"step": torch.tensor(float(len(losses))), **state}
        return losses
