"""The maps of a corrected plan: how they come to the workers, and where a layer keeps its own.

A plan stands in the model's configuration as JSON, which holds no tensors. What it says of its correction names the
folder or the repository of the Hub where the maps are, and their hash. Every worker reads them there, all of them: the
ranks of a tensor-parallel group have the same hidden states, so they add the same.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orthorank.common.errors import OrthoRankError, shown
from orthorank.common.hub import Place, fetch, place_of
from orthorank.config import OrthoRankConfig
from orthorank.correction import FILE_NAME, Correction, LayerMap, Record
from orthorank.plan_checks import check_maps

if TYPE_CHECKING:
    from torch import nn

WHERE = "maps"  # the key of a correction


def where_of(plan: OrthoRankConfig) -> str:
    """Where the maps of ``plan`` are: ``org/name@commit`` on the Hub, or the absolute path of a folder.

    Raises:
        OrthoRankError: they were read from nowhere.
    """
    assert plan.correction is not None
    if plan.source is not None:
        return plan.source
    if plan.correction.file is None:
        raise OrthoRankError(
            "the plan's maps are in memory alone, and every worker reads them from a file; save the plan with "
            "save_pretrained(folder), and read it with OrthoRankConfig.from_pretrained(folder)"
        )
    return os.path.abspath(plan.correction.file.parent)


def with_maps(values: dict[str, Any]) -> OrthoRankConfig:
    """The plan in ``values``, as JSON has it, with the maps that its correction names.

    Raises:
        OrthoRankError: it does not say where they are, they are not there, or they are others.
    """
    said = values["correction"]
    record = Record.of(said)
    plan = OrthoRankConfig.from_dict({name: value for name, value in values.items() if name != "correction"})
    check_maps(plan, record.layers, record.hidden_size)
    file, plan.source = _find(said.get(WHERE), record)
    try:
        plan.correction = Correction.load(file, record)
    except OrthoRankError as error:
        raise OrthoRankError(
            f"{error}; every worker reads this file, so each node needs the one of the plan that `orthorank vllm-args` "
            "was given"
        ) from error
    return plan


def _find(where: object, record: Record) -> tuple[Path, str | None]:
    """The file of maps, and ``org/name@commit`` of one from the Hub."""
    if isinstance(where, str) and os.path.isabs(where):
        return Path(where) / FILE_NAME, None
    place = place_of(where) if isinstance(where, str) else None
    if place is None or place.revision is None:
        raise OrthoRankError(
            f"the plan is corrected, and correction[{WHERE!r}] is {shown(where)}; it must say where every worker finds "
            "the maps: the absolute path of the plan's folder, or org/name@revision on the Hub, as `orthorank "
            "vllm-args PLAN` prints it"
        )
    file, commit = fetch(place, FILE_NAME, record.most_bytes)
    return file, str(Place(place.repo, commit))


def hold(layer: "nn.Module", layer_map: LayerMap) -> None:
    """Keep ``layer_map`` with ``layer``: as buffers, which vLLM saves while it sleeps, and which no checkpoint has."""
    for name, part in layer_map._asdict().items():
        layer.register_buffer(f"orthorank_{name}", part, persistent=False)


def held(layer: Any) -> LayerMap | None:
    """What `hold` left with ``layer``; None: nothing."""
    if getattr(layer, "orthorank_down", None) is None:
        return None
    return LayerMap(layer.orthorank_down, layer.orthorank_up, layer.orthorank_bias)
