"""The option ``--criterion``: criteria of one's own, as a name or as module:function."""

from collections.abc import Sequence

OWN_CRITERION = "Criterion of your own that plans name, as module:function; may be given several times."


def register(options: Sequence[str] | None) -> list[str]:
    """Register what was given; returns the names for plans."""
    from orthorank.common.criteria import given

    return [given(option) for option in options or ()]
