"""A whole search: from settings to a plan in a folder."""

from typing import Any

from orthorank.common.progress import Screen, SilentScreen
from orthorank.search.distributed import joined, together
from orthorank.search.finish import finish
from orthorank.search.job import aim, check_agreement, prepare
from orthorank.search.methods import choose
from orthorank.search.settings import SearchSettings


def run_search(settings: SearchSettings, screen: Screen | None = None) -> dict[str, Any]:
    """Choose layers and write the plan to ``settings.output``.

    Args:
        settings: what to do. screen: is told what happens; None: nobody.

    Returns:
        The results, as ``search.json`` in the folder holds them: ``rows`` (the dense model and the plan), ``plan``,
        ``plan_file``, ``order``, ``losses``, ``scores``, ``seconds``.

    Raises:
        OrthoRankError: something is wrong or missing, or the search was interrupted; then the message says how to go
            on with it.
    """
    with joined() as group:
        watched = screen if screen is not None and group.rank == 0 else SilentScreen()
        job = together(group, lambda: prepare(settings, watched, group))
        together(group, lambda: aim(job))
        check_agreement(job)
        return finish(job, choose(job))
