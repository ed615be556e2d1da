"""Windows of a text, and losses on them compared window by window."""

import math
import statistics

import torch

from orthorank import OrthoRankError


def cut(ids: list[int], length: int, windows: int, name: str) -> torch.Tensor:
    """The first ``[windows, length]`` tokens."""
    if len(ids) < length * windows:
        raise OrthoRankError(f"{name} has {len(ids)} tokens; {windows} windows of {length} need {length * windows}")
    return torch.tensor(ids[: length * windows]).view(windows, length)


def compare(mine: list[float], theirs: list[float]) -> dict[str, float]:
    """Mean difference of the losses, with its standard error between windows (paired)."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.nan
    return {"difference": statistics.fmean(differences), "standard_error": error}
