"""What plans may ask for here. Other packages' serving stacks and ours refuse the rest before anything runs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orthorank.common.criteria import BUILT_IN, FUSED, find
from orthorank.common.errors import OrthoRankError
from orthorank.hf import ablations as ablations  # which registers its criteria

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

GIVEN = {"scores", "layer", "seed"}  # what a registered criterion may need here


def obstacles(plan: "OrthoRankConfig") -> Iterator[str]:
    """What ``plan`` asks for and a layer over a paged cache does not do, each with the remedy.

    Example:
        >>> from orthorank import OrthoRankConfig
        >>> list(obstacles(OrthoRankConfig(layers=[2], update_sink=True)))
        ["update_sink is True: the sink's state would depend on the request; set it to False"]
    """
    yield from _criterion(plan.criterion)
    if plan.kv != "all":
        yield "kv is 'selected', an ablation of the paper: a server's cache holds all tokens; set kv to 'all'"
    if plan.update_sink:
        yield "update_sink is True: the sink's state would depend on the request; set it to False"
    if plan.sinks != "first":
        yield "sinks is 'auto', which servers do not know; set it to 'first'"
    if plan.decode != "dense":
        yield "decode is 'threshold', and servers compute generated tokens in all layers; set it to 'dense'"


def _criterion(name: str) -> Iterator[str]:
    if name in FUSED:
        return
    criterion = find(name)
    needed = [need for need in criterion.needs if need not in GIVEN] + ([] if criterion.normed else ["normed=False"])
    if not criterion.pointwise:
        needed = ["pointwise=False"]
    if needed and name in BUILT_IN:
        yield f"criterion is {name!r}, an ablation of the paper; servers know 'orthogonal', 'inverse', 'cosine'"
    elif needed:
        yield (
            f"criterion is {name!r}, registered with {', '.join(needed)}; a server has the normed state of each token "
            "and of the sink alone: use a criterion that is pointwise and needs no more"
        )


def check(plan: "OrthoRankConfig") -> None:
    """Raises `OrthoRankError` with the first of `obstacles`."""
    for obstacle in obstacles(plan):
        raise OrthoRankError(obstacle)
