"""What plans may ask for here. Other packages' serving stacks and ours refuse the rest before anything runs."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from orthorank.common.errors import OrthoRankError

if TYPE_CHECKING:
    from orthorank.config import OrthoRankConfig

# How `rms_norm_score` scores for each criterion that is known here.
SCORES = {"orthogonal": "inner", "inverse": "inner", "cosine": "cosine"}


def obstacles(plan: "OrthoRankConfig") -> Iterator[str]:
    """What ``plan`` asks for and a layer over a paged cache does not do, each with the remedy.

    Example:
        >>> from orthorank import OrthoRankConfig
        >>> list(obstacles(OrthoRankConfig(layers=[2], update_sink=True)))
        ["update_sink is True: the sink's state would depend on the request; set it to False"]
    """
    if plan.criterion not in SCORES:
        yield f"criterion is {plan.criterion!r}, an ablation of the paper; servers know {', '.join(map(repr, SCORES))}"
    if plan.kv != "all":
        yield "kv is 'selected', an ablation of the paper: a server's cache holds all tokens; set kv to 'all'"
    if plan.update_sink:
        yield "update_sink is True: the sink's state would depend on the request; set it to False"
    if plan.sinks != "first":
        yield "sinks is 'auto', which servers do not know; set it to 'first'"
    if plan.decode != "dense":
        yield "decode is 'threshold', and servers compute generated tokens in all layers; set it to 'dense'"


def check(plan: "OrthoRankConfig") -> None:
    """Raises `OrthoRankError` with the first of `obstacles`."""
    for obstacle in obstacles(plan):
        raise OrthoRankError(obstacle)
